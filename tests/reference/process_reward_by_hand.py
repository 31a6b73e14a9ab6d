"""Process rewards with floats and loops: arXiv 2503.10291, and the public code's way to score.

``mc_i`` is the share of right continuations of step i, the label "+" iff ``mc_i > threshold``. The
loss of a label is ``-log`` of its probability, over the vocabulary or over the two tokens; a step's
score is the probability of "+" over the two tokens, a solution's their mean.
"""

from __future__ import annotations

import math

Step = tuple[list[float], bool, float]  # scores of the vocabulary, label, weight


def probability(scores: list[float], token: int, among: list[int]) -> float:
    """softmax(scores[among]) at the token."""
    highest = max(scores[other] for other in among)
    total = sum(math.exp(scores[other] - highest) for other in among)
    return math.exp(scores[token] - highest) / total


def loss(steps: list[Step], plus: int, minus: int, minus_weight: float, *, pair: bool) -> float:
    """Weighted mean over the steps of a whole step of training."""
    numerator = weight_sum = 0.0
    for scores, is_plus, weight in steps:
        own = weight if is_plus else weight * minus_weight
        among = [plus, minus] if pair else list(range(len(scores)))
        numerator -= own * math.log(probability(scores, plus if is_plus else minus, among))
        weight_sum += own
    return numerator / weight_sum


def solution_score(steps: list[list[float]], plus: int, minus: int) -> float:
    """Mean over the steps of P("+")."""
    total = 0.0
    for scores in steps:
        total += probability(scores, plus, [plus, minus])
    return total / len(steps)


def macro_f1(found: list[bool], truth: list[bool | None]) -> float:
    """Mean over the two classes of 2 TP / (2 TP + FP + FN); 0 where a class never occurs."""
    values = []
    for wanted in (True, False):
        hits = misses = false_alarms = 0
        for said, holds in zip(found, truth, strict=True):
            if holds is None:
                continue
            hits += said is wanted and holds is wanted
            misses += said is not wanted and holds is wanted
            false_alarms += said is wanted and holds is not wanted
        total = 2 * hits + misses + false_alarms
        values.append(2 * hits / total if total else 0.0)
    return sum(values) / 2


def majority(answers: list[str | None]) -> str | None:
    """The most frequent answer; of equals the one that came first."""
    best, most = None, 0
    for answer in answers:
        count = sum(answer == other for other in answers)
        if answer is not None and count > most:
            best, most = answer, count
    return best
