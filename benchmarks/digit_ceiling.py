"""What the handwriting material allows: a support vector machine on the very same scans.

It sees every scan alone, upright and centred, which no model of pictures does, and so bounds what
reading numbers can reach. Run: ``python benchmarks/digit_ceiling.py``.
"""

from __future__ import annotations

import json

import numpy as np
from sklearn.svm import SVC

from cascadevl.tasks.base import Split
from cascadevl.tasks.handwriting import load_scans


def material(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Scans as rows of numbers, and their digits."""
    scans = load_scans(split)
    digits = np.empty(len(scans.images), dtype=np.int64)
    for digit, members in enumerate(scans.by_class):
        digits[list(members)] = digit
    return scans.images.reshape(len(digits), -1) / 255.0, digits


def main() -> None:
    """Fit and score two settings."""
    (train, train_digits), (test, test_digits) = material("train"), material("test")
    wide = 1.0 / (train.shape[1] * train.var())
    results = {}
    for name, gamma in {"gamma as scikit-learn sets it": wide, "twice that": 2 * wide}.items():
        right = SVC(C=10, gamma=gamma).fit(train, train_digits).score(test, test_digits)
        results[name] = right
        print(f"{name}: {100 * right:.1f} % of digits, so {100 * right**2:.1f} % of pairs")
    print(json.dumps({"train": len(train), "test": len(test), "right": results}))


if __name__ == "__main__":
    main()
