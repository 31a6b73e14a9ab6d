"""GSPO and GRPO with floats and loops: arXiv 2507.18071, eqs. 5 to 7, and arXiv 2402.03300, eq. 3.

``A_i = (r_i - mean(r)) / (std(r) + eps)``; ``s_i = prod_t (pi / pi_old) ** (1 / |y_i|)``; the loss
is ``-1/N sum_i min(s_i A_i, clip(s_i) A_i)``. GRPO has the minimum inside, a mean over the tokens.
"""

from __future__ import annotations

import math

Answer = list[tuple[float, float]]  # of each token: log-probability now, and before


def advantages(rewards: list[float], *, unbiased: bool, eps: float) -> list[float]:
    """Advantages of one group."""
    mean = sum(rewards) / len(rewards)
    squares = sum((reward - mean) ** 2 for reward in rewards)
    deviation = math.sqrt(squares / (len(rewards) - 1 if unbiased else len(rewards)))
    return [(reward - mean) / (deviation + eps) for reward in rewards]


def clipped(ratio: float, advantage: float, low: float, high: float) -> float:
    """min(s A, clip(s) A)."""
    return min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def gspo(
    answers: list[Answer], advantages: list[float], low: float, high: float, count: int
) -> float:
    """A ratio for each answer: the geometric mean of its tokens' ratios."""
    total = 0.0
    for answer, advantage in zip(answers, advantages, strict=True):
        ratio = math.prod(math.exp(now) / math.exp(old) for now, old in answer)
        total += clipped(ratio ** (1 / len(answer)), advantage, low, high)
    return -total / count


def grpo(
    answers: list[Answer], advantages: list[float], low: float, high: float, count: int
) -> float:
    """A ratio for each token."""
    total = 0.0
    for answer, advantage in zip(answers, advantages, strict=True):
        values = [clipped(math.exp(now - old), advantage, low, high) for now, old in answer]
        total += sum(values) / len(values)
    return -total / count
