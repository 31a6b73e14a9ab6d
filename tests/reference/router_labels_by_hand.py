"""Labels of tiles and the router's loss, in loops over plain numbers (InternVL3.5 report, ViCO)."""

from __future__ import annotations

import math
from collections.abc import Sequence


def quantile(values: Sequence[float], share: float) -> float:
    """Interpolated linearly between the ordered values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def latest(values: Sequence[float], number: int, window: int) -> list[float]:
    """The last ``window`` values up to this one; of the first ones, the first ``window``."""
    end = max(number + 1, window)
    return list(values[max(0, end - window) : end])


def labels(
    samples: Sequence[tuple[float, Sequence[float]]],
    *,
    ratio: bool,
    percentile: float,
    window: int,
    floor: float,
) -> tuple[list[bool], list[float], list[bool]]:
    """Keep, what was compared, and which samples are floored.

    Args:
        samples: The full loss of each, and its loss with each tile compressed.
        ratio: Ratio or difference.
        percentile: Of the threshold.
        window: Of tiles and of samples.
        floor: Share of the running median.
    """
    full = [loss for loss, _ in samples]
    measures, floored = [], []
    for number, (loss, tiles) in enumerate(samples):
        least = floor * quantile(latest(full, number, window), 0.5)
        floored.append(loss < least)
        for tile in tiles:
            measures.append(tile / max(loss, least) if ratio else tile - loss)
    keep = [
        value >= quantile(latest(measures, number, window), percentile / 100)
        for number, value in enumerate(measures)
    ]
    return keep, measures, floored


def variance_between(groups: Sequence[Sequence[float]]) -> float:
    """Share of the variance that lies between groups."""
    every = [value for group in groups for value in group]
    centre = sum(every) / len(every)
    whole = sum((value - centre) ** 2 for value in every)
    within = 0.0
    for group in groups:
        mean = sum(group) / len(group)
        within += sum((value - mean) ** 2 for value in group)
    return 1 - within / whole


def loss(tiles: Sequence[tuple[float, float, bool, float]]) -> tuple[float, float, float]:
    """Cross-entropy, accuracy and share kept of (logit to compress, to keep, label, weight)."""
    total = sum(weight for *_, weight in tiles)
    entropy = accuracy = kept = 0.0
    for compress, keep, label, weight in tiles:
        probability = math.exp(keep) / (math.exp(compress) + math.exp(keep))
        entropy -= weight / total * math.log(probability if label else 1 - probability)
        accuracy += weight / total * ((probability >= 0.5) == label)
        kept += weight / total * (probability >= 0.5)
    return entropy, accuracy, kept
