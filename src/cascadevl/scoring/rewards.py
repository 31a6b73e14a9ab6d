r"""What an answer is worth in reinforcement learning: named verifiers, weighed and added up.

A verifier looks at a `Response` and gives a number, 1 for good and 0 for bad. Those of the package
are in `VERIFIERS`; anybody's own is named as ``module:function``. The default, 0.9 for the right
answer and 0.1 for the form, is that of the public code for mathematical questions; the
InternVL3.5 report does not give its rewards (docs/decisions/0023).
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from cascadevl.errors import ConfigError
from cascadevl.scoring.reasoning import Rules, Solution, take_apart

Overlong: TypeAlias = Literal["zero", "keep", "leave_out"]
"""What becomes of an answer that was cut off at its limit of tokens. ``zero``: no verifier but
``length`` gives it anything. ``keep``: it is judged as it stands. ``leave_out``: it is judged, and
counts in its group's mean, but the model does not learn from it (overlong filtering, DAPO, arXiv
2503.14476)."""

LENGTH_BUFFER = 0.2
"""Last part of the limit in which ``length`` falls (DAPO: 4,096 of 20,480 tokens)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """An answer as verifiers see it.

    Attributes:
        text: The whole answer, thinking included, as a user would see it.
        question: The text that was asked, without pictures.
        reference: The reference answer.
        correct: Whether the final answer agrees with the reference.
        num_tokens: Tokens of the answer.
        max_tokens: Most tokens it could have.
        is_cut: Whether it was cut off there.
    """

    text: str
    question: str
    reference: str
    correct: bool
    num_tokens: int
    max_tokens: int
    is_cut: bool = False


Verifier: TypeAlias = Callable[[Response], float]
"""From an answer to a number, the higher the better; always the same for the same answer."""


@dataclass(frozen=True, slots=True)
class Reward:
    """What an answer is worth.

    Attributes:
        values: Of each verifier, unweighted.
        total: Their weighted sum.
    """

    values: Mapping[str, float]
    total: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """What answers are rewarded for.

    Attributes:
        weights: Weight of each verifier: a name in `VERIFIERS`, or ``module:function`` of a
            `Verifier` in any module that can be imported. Weight 0 only records the value.
        overlong: What becomes of answers that were cut off.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {"accuracy": 0.9, "format": 0.1})
    overlong: Overlong = "zero"

    def __post_init__(self) -> None:
        """Refuse weights that reward nothing."""
        wrong = {name: weight for name, weight in self.weights.items() if not math.isfinite(weight)}
        if wrong or not any(self.weights.values()):
            raise ConfigError(
                f"rewards.weights is {dict(self.weights)}; give at least one verifier a finite "
                "weight other than 0"
            )


def accuracy(response: Response) -> float:
    """1 if the final answer is right."""
    return float(response.correct)


def thinking_format(response: Response) -> float:
    """1 for exactly one closed ``<think>...</think>`` at the beginning and an answer behind it."""
    return float(isinstance(take_apart(response.text), Solution))


def boxed_format(response: Response) -> float:
    r"""The same, and the answer holds a complete ``\boxed{...}``."""
    return float(isinstance(take_apart(response.text, Rules(boxed=True)), Solution))


def length(response: Response) -> float:
    """0 for most lengths, falling to -1 over the last fifth of the limit (DAPO, eq. 13)."""
    buffer = LENGTH_BUFFER * response.max_tokens
    over = response.num_tokens - (response.max_tokens - buffer)
    return -min(1.0, max(0.0, over / buffer))


VERIFIERS: Mapping[str, Verifier] = {
    "accuracy": accuracy,
    "format": thinking_format,
    "boxed_format": boxed_format,
    "length": length,
}
"""The verifiers of the package."""


def verifier_named(name: str) -> Verifier:
    """A verifier of the package, or anybody's own.

    Args:
        name: A key of `VERIFIERS`, or ``module:function``.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]
    module, colon, function = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, VERIFIERS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"there is no verifier {name!r}; did you mean {near!r}? Known are "
            f"{', '.join(VERIFIERS)}; one's own is named module:function"
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the verifier {name!r} cannot be imported ({error}); put its module where Python "
            "finds it, for example with PYTHONPATH=."
        ) from error
    if not callable(found):
        raise ConfigError(f"the verifier {name!r} is {found!r}, not a function of a Response")
    verifier: Verifier = found
    return verifier


def verifiers_of(config: RewardConfig) -> dict[str, Verifier]:
    """The verifiers that a configuration names.

    Raises:
        ConfigError: If one does not exist.
    """
    return {name: verifier_named(name) for name in config.weights}


def judged(response: Response, verifiers: Mapping[str, Verifier], config: RewardConfig) -> Reward:
    """What an answer is worth.

    Args:
        response: The answer.
        verifiers: From `verifiers_of`.
        config: Their weights, and the rule for answers that were cut off.

    Raises:
        ValueError: If a verifier gives something that is no finite number.
    """
    is_lost = response.is_cut and config.overlong == "zero"
    values = {}
    for name, verifier in verifiers.items():
        value = 0.0 if is_lost and verifier is not length else float(verifier(response))
        if not math.isfinite(value):
            raise ValueError(f"the verifier {name!r} gave {value} for the answer {response.text!r}")
        values[name] = value
    total = sum(config.weights[name] * value for name, value in values.items())
    return Reward(values, total)
