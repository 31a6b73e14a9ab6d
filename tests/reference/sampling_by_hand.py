"""How a token is drawn, in floats and loops: filters, random stream, inverse distribution."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

WORD = 2**64


def mix(word: int) -> int:
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % WORD
    return word ^ (word >> 31)


def splitmix64(seed: int, number: int) -> int:
    """The output with a number, from 0, of the generator begun with a seed."""
    return mix((seed + (number + 1) * 0x9E3779B97F4A7C15) % WORD)


def uniform(seed: int, sample: int, token: int) -> float:
    request = splitmix64(seed, 0)
    stream = splitmix64(request, sample)
    return (splitmix64(stream, token) >> 11) / 2**53


def distribution(
    logits: Sequence[float],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seen: Collection[int] = (),
    forbidden: Collection[int] = (),
) -> list[float]:
    """Probability of every token."""
    scores = {}
    for token, logit in enumerate(logits):
        if token in forbidden:
            continue
        score = logit
        if token in seen and score > 0:
            score = score / repetition_penalty
        elif token in seen:
            score = score * repetition_penalty
        scores[token] = score
    largest = max(scores.values())
    if temperature == 0:
        first = min(token for token, score in scores.items() if score == largest)
        return [float(token == first) for token in range(len(logits))]
    weights = {token: math.exp((s - largest) / temperature) for token, s in scores.items()}
    if top_k:
        kth = sorted(weights.values(), reverse=True)[min(top_k, len(weights)) - 1]
        weights = {token: weight for token, weight in weights.items() if weight >= kth}
    if top_p < 1:
        total, reached, last = sum(weights.values()), 0.0, 0.0
        for weight in sorted(weights.values(), reverse=True):
            reached, last = reached + weight, weight
            if reached >= top_p * total:
                break
        weights = {token: weight for token, weight in weights.items() if weight >= last}
    limit = min_p * max(weights.values())
    weights = {token: weight for token, weight in weights.items() if weight >= limit}
    total = sum(weights.values())
    return [weights.get(token, 0.0) / total for token in range(len(logits))]


def drawn(probabilities: Sequence[float], number: float) -> int:
    """The first token with which the sum exceeds the number."""
    reached = 0.0
    for token, probability in enumerate(probabilities):
        reached += probability
        if reached > number:
            return token
    raise AssertionError("the sum stayed below the number")
