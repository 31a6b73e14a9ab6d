"""Mixed preference optimisation with floats and loops: InternVL3 report, section 2.4.

Every answer is the list of its tokens' log-probabilities, under the model and under the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """Log-probability of each token under the model in training, and under the reference."""

    model: list[float]
    reference: list[float]

    def gain(self) -> float:
        """log of the ratio of the whole answer's two probabilities."""
        return sum(self.model) - sum(self.reference)

    def mean_gain(self) -> float:
        return self.gain() / len(self.model)


Pair = tuple[Answer, Answer]  # chosen, rejected


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def smoothed(c: float, r: float, beta: float, flipped: float, sign: float) -> float:
    """What the pair costs with its labels right, and (by ``sign``) what with them wrong."""
    right, wrong = -math.log(sigma(beta * (c - r))), -math.log(sigma(beta * (r - c)))
    return (1 - flipped) * right + sign * flipped * wrong


def exo(q: float, flipped: float) -> float:
    return q * math.log(q / (1 - flipped)) + (1 - q) * math.log((1 - q) / flipped)


def nca(c: float, r: float) -> float:
    return -math.log(sigma(c)) - (math.log(sigma(-c)) + math.log(sigma(-r))) / 2


# Of beta, the gains of both answers, their means over tokens, and the share of wrong labels.
FORMS: dict[str, Callable[[float, float, float, float, float, float], float]] = {
    "sigmoid": lambda b, c, r, mc, mr, e: -math.log(sigma(b * c - b * r)),
    "sigmoid_norm": lambda b, c, r, mc, mr, e: -math.log(sigma(b * (mc - mr))),
    "smoothed": lambda b, c, r, mc, mr, e: smoothed(c, r, b, e, +1),
    "robust": lambda b, c, r, mc, mr, e: smoothed(c, r, b, e, -1) / (1 - 2 * e),
    "hinge": lambda b, c, r, mc, mr, e: max(0.0, 1 - b * (c - r)),
    "ipo": lambda b, c, r, mc, mr, e: (mc - mr - 1 / (2 * b)) ** 2,
    "exo_pair": lambda b, c, r, mc, mr, e: exo(sigma(b * (c - r)), e),
    "nca_pair": lambda b, c, r, mc, mr, e: nca(b * c, b * r),
    "sppo_hard": lambda b, c, r, mc, mr, e: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
    "apo_zero": lambda b, c, r, mc, mr, e: 1 - sigma(b * c) + sigma(b * r),
    "apo_down": lambda b, c, r, mc, mr, e: sigma(b * c) + 1 - sigma(b * (c - r)),
}


def preference(pair: Pair, beta: float, kind: str = "sigmoid", flipped: float = 0.0) -> float:
    """The preference term of one pair in its forms."""
    chosen, rejected = pair
    gains = (chosen.gain(), rejected.gain(), chosen.mean_gain(), rejected.mean_gain())
    return FORMS[kind](beta, *gains, flipped)


def quality(pair: Pair, beta: float, shift: float) -> float:
    """BCO of one pair."""
    good, bad = beta * pair[0].gain(), beta * pair[1].gain()
    return -math.log(sigma(good - shift)) - math.log(sigma(-(bad - shift)))


def generation(pair: Pair) -> float:
    """Mean over the chosen answer's tokens."""
    return -sum(pair[0].model) / len(pair[0].model)


def loss(
    pairs: list[Pair],
    shift: float,
    weights: tuple[float, float, float] = (0.8, 0.2, 1.0),
    beta: float = 0.1,
) -> float:
    """The loss of a step of these pairs."""
    total = 0.0
    for pair in pairs:
        total += weights[0] * preference(pair, beta)
        total += weights[1] * quality(pair, beta, shift)
        total += weights[2] * generation(pair)
    return total / len(pairs)


def shift_of(steps: list[list[Pair]], beta: float = 0.1) -> float:
    """Mean reward of all answers of all these steps; 0 of none."""
    found = [beta * answer.gain() for pairs in steps for pair in pairs for answer in pair]
    return sum(found) / len(found) if found else 0.0
