"""What the handwriting material allows: a support vector machine on the very same scans.

Run: ``python benchmarks/digit_ceiling.py``. What it makes of whole numbers, on the very questions
that micro is asked, is in ``benchmarks/examine_micro.py``.
"""

from __future__ import annotations

import json

from cascadevl.eval.digit_ceiling import GAMMA_FACTORS, fit, material


def main() -> None:
    """Fit and score two settings."""
    test, digits = material("test")
    results = {}
    for factor in GAMMA_FACTORS:
        right = float(fit(factor).score(test, digits))
        results[f"gamma {factor:g}"] = right
        print(
            f"gamma {factor:g} times scikit-learn's: {100 * right:.1f} % of digits, "
            f"so {100 * right**2:.1f} % of pairs"
        )
    print(json.dumps({"train": len(material("train")[1]), "test": len(digits), "right": results}))


if __name__ == "__main__":
    main()
