"""The next-token loss with floats and loops: InternVL3 report, section 2.2; InternVL2.5 report.

``L = sum_i w_i * (-log p(x_i | x_<i)) / sum_j w_j`` with ``w = 1 / l ** power``, l the number of
loss tokens of the token's sample, over all samples of a step.
"""

from __future__ import annotations

import math

Sample = list[tuple[list[float], int]]  # of each loss token: the scores, and the right token


def logprob(scores: list[float], token: int) -> float:
    """log softmax(scores)[token]."""
    highest = max(scores)
    total = sum(math.exp(score - highest) for score in scores)
    return scores[token] - highest - math.log(total)


def loss(samples: list[Sample], power: float) -> float:
    """Loss of a step; ``power`` is 0, 1/2, 1 for token, square and sample averaging."""
    numerator = 0.0
    weight_sum = 0.0
    for sample in samples:
        for scores, token in sample:
            weight = 1 / len(sample) ** power
            numerator += weight * -logprob(scores, token)
            weight_sum += weight
    return numerator / weight_sum
