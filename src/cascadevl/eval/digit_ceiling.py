"""What the handwriting material allows: a support vector machine on the very same scans.

It is given every scan alone, upright and centred, which no model of pictures is, and so bounds
what reading handwritten numbers can reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from cascadevl.tasks.base import Split
from cascadevl.tasks.handwriting import Handwriting, load_scans

if TYPE_CHECKING:
    from sklearn.svm import SVC

GAMMA_FACTORS = (1.0, 2.0)
"""Kernel parameters that are tried, as multiples of what scikit-learn calls ``scale``."""


def material(
    split: Split,
) -> tuple[Float[np.ndarray, "scans 64"], Int[np.ndarray, " scans"]]:
    """Scans as rows of numbers from 0 to 1, and their digits."""
    scans = load_scans(split)
    digits = np.empty(len(scans.images), dtype=np.int64)
    for digit, members in enumerate(scans.by_class):
        digits[list(members)] = digit
    return scans.images.reshape(len(digits), -1) / 255.0, digits


def fit(gamma_factor: float) -> SVC:
    """A support vector machine on the training scans.

    Args:
        gamma_factor: The kernel parameter, as in ``GAMMA_FACTORS``.
    """
    from sklearn.svm import SVC  # a second to import

    scans, digits = material("train")
    return SVC(C=10, gamma=gamma_factor / (scans.shape[1] * scans.var())).fit(scans, digits)


def numbers_read(
    task: Handwriting, *, split: Split, seed: int, indices: Sequence[int]
) -> list[tuple[str, str]]:
    """What the machine reads in some scenes, digit by digit, beside what is written.

    The kernel is the one that cross-validation on the training scans prefers.

    Args:
        task: The family; its scenes must show one number.
        split: Part of the material.
        seed: Seed of the scenes.
        indices: Which scenes.

    Returns:
        Of each scene the number read and the number written.
    """
    from sklearn.model_selection import cross_val_score

    best = max(
        GAMMA_FACTORS, key=lambda factor: cross_val_score(fit(factor), *material("train")).mean()
    )
    read = fit(best).predict(material(split)[0])  # of every scan of the part
    pairs = []
    for index in indices:
        _, placed = task.draw_placed(split, seed, index)
        said = "".join(str(read[each.scan]) for each in placed)
        pairs.append((said, "".join(str(each.digit) for each in placed)))
    return pairs
