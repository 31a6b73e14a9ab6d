"""Scores with their uncertainty, and the score that knowing nothing would give.

A share of right answers without an interval and without the most frequent answer's share beside
it says little about a small model, so reports take all three from here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its confidence interval.

    Attributes:
        value: The mean.
        low: Lower end of the interval.
        high: Upper end of the interval.
        num: Number of observations.
    """

    value: float
    low: float
    high: float
    num: int


def wilson_interval(
    num_right: int, num_total: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of a share (Wilson 1927), sound for small numbers and for shares near 0 and 1.

    Args:
        num_right: Successes.
        num_total: Trials; with none, the interval is (0, 1).
        confidence: Coverage, between 0 and 1.

    Raises:
        ValueError: If there are more successes than trials, or a negative number of either.
    """
    if not 0 <= num_right <= num_total:
        raise ValueError(f"{num_right} right answers of {num_total} is not a share")
    if num_total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = num_right / num_total
    scale = 1 + z * z / num_total
    centre = (share + z * z / (2 * num_total)) / scale
    half = z * math.sqrt((share * (1 - share) + z * z / (4 * num_total)) / num_total) / scale
    # At the borders the ends are 0 and 1 in theory; rounding would leave them just beside.
    low = 0.0 if num_right == 0 else max(0.0, centre - half)
    high = 1.0 if num_right == num_total else min(1.0, centre + half)
    return low, high


def accuracy(right: Sequence[bool], *, confidence: float = 0.95) -> Estimate:
    """Share of right answers with its Wilson interval.

    Args:
        right: Whether each answer was right. With none, the value is 0 and the interval (0, 1).
        confidence: Coverage of the interval.
    """
    num_right = sum(map(bool, right))
    low, high = wilson_interval(num_right, len(right), confidence=confidence)
    return Estimate(
        value=num_right / len(right) if right else 0.0, low=low, high=high, num=len(right)
    )


def bootstrap_interval(
    values: Sequence[float],
    generator: np.random.Generator,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean, for scores that are not shares (ANLS, F1, IoU).

    Args:
        values: One score an observation.
        generator: Source of the resampling.
        num_resamples: How many means to draw.
        confidence: Coverage, between 0 and 1.

    Raises:
        ValueError: If there are no values.
    """
    if not values:
        raise ValueError("no values to resample; a bootstrap interval needs at least one")
    scores = np.asarray(values, dtype=np.float64)
    means = np.array(
        [
            scores[generator.integers(len(scores), size=len(scores))].mean()
            for _ in range(num_resamples)
        ]
    )
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def most_frequent_share(answers: Sequence[Hashable]) -> float:
    """Share of the most frequent answer: what always giving that answer would score."""
    return Counter(answers).most_common(1)[0][1] / len(answers) if answers else 0.0


def macro_f1(predictions: Sequence[Hashable], truths: Sequence[Hashable]) -> float:
    """Mean F1 over the classes that occur among the truths, each class counting the same.

    Raises:
        ValueError: If the two differ in length.
    """
    if len(predictions) != len(truths):
        raise ValueError(f"{len(predictions)} predictions for {len(truths)} truths")
    predicted, expected = Counter(predictions), Counter(truths)
    right = Counter(p for p, t in zip(predictions, truths, strict=True) if p == t)
    scores = [2 * right[label] / (predicted[label] + expected[label]) for label in expected]
    return sum(scores) / len(scores) if scores else 0.0


def area_under_roc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """How often a positive one scores above a negative one, half of the ties counted (AUC).

    Args:
        scores: One a case, higher for those thought positive.
        positive: Whether each case is.

    Returns:
        1/2 for scores that say nothing; NaN without a case of either kind.

    Raises:
        ValueError: If the two differ in length.
    """
    if len(scores) != len(positive):
        raise ValueError(f"{len(scores)} scores for {len(positive)} cases")
    is_positive = np.asarray(positive, dtype=np.bool_)
    num_positive = int(is_positive.sum())
    pairs = num_positive * (len(is_positive) - num_positive)
    if not pairs:
        return math.nan
    _, place, count = np.unique(
        np.asarray(scores, dtype=np.float64), return_inverse=True, return_counts=True
    )
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]  # equal scores share their mean rank
    above = ranks[is_positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / pairs)
