"""Visual consistency with floats and loops: InternVL3.5 report, ViCO, stage 1.

A distribution is the list of a whole vocabulary's scores.
"""

from __future__ import annotations

import math


def probabilities(scores: list[float]) -> list[float]:
    exponentials = [math.exp(score) for score in scores]
    return [one / sum(exponentials) for one in exponentials]


def kl(p: list[float], q: list[float]) -> float:
    """``KL(p || q)`` of two lists of probabilities."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def whole(reference: list[float], model: list[float]) -> float:
    """Divergence over the whole vocabulary."""
    return kl(probabilities(reference), probabilities(model))


def merged(reference: list[float], model: list[float], k: int) -> float:
    """The same with all tokens but the reference's k most probable ones thrown together."""
    p, q = probabilities(reference), probabilities(model)
    order = sorted(range(len(p)), key=lambda token: -p[token])
    top, others = order[:k], order[k:]
    mass_p, mass_q = sum(p[token] for token in others), sum(q[token] for token in others)
    return kl([p[token] for token in top] + [mass_p], [q[token] for token in top] + [mass_q])


def within(reference: list[float], model: list[float], k: int) -> float:
    """What `merged` lacks: the mass of the others times their own divergence."""
    p, q = probabilities(reference), probabilities(model)
    others = sorted(range(len(p)), key=lambda token: -p[token])[k:]
    mass_p, mass_q = sum(p[token] for token in others), sum(q[token] for token in others)
    inner = kl([p[token] / mass_p for token in others], [q[token] / mass_q for token in others])
    return mass_p * inner


def loss(responses: list[list[tuple[list[float], list[float]]]]) -> float:
    """Mean over responses of the mean over their tokens; a token is (reference, model)."""
    means = [sum(whole(*token) for token in each) / len(each) for each in responses]
    return sum(means) / len(means)
