"""AdamW with decoupled decay (Loshchilov and Hutter, algorithm 2), one float at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence


def weights_after(
    weight: float,
    gradients: Sequence[float],
    lrs: Sequence[float],
    *,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> float:
    """The weight after one update for each gradient."""
    first = second = 0.0
    for number, (gradient, lr) in enumerate(zip(gradients, lrs, strict=True), start=1):
        weight -= lr * decay * weight
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        corrected = first / (1 - betas[0] ** number)
        spread = math.sqrt(second / (1 - betas[1] ** number))
        weight -= lr * corrected / (spread + eps)
    return weight
