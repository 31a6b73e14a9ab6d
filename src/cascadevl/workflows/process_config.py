"""How steps of solutions are judged by continuations, and what became of the questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import ConfigError, DataError, RequestError
from cascadevl.model.v2pe import Increments
from cascadevl.scoring.steps import StepRules

Choice: TypeAlias = Literal["first", "balanced"]
"""Which solutions of a question are judged."""


def _sampling() -> SamplingParams:
    return SamplingParams(temperature=1.0, max_tokens=4096)  # script of VisualPRM v1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessConfig:
    """Of which solutions data for process rewards are made, and how.

    Attributes:
        store: Folder of the rollouts, whose answers are the solutions.
        out: Folder of the data.
        num_solutions: Most solutions of a question, which differ.
        choose: Its ``first`` ones; or ``balanced``, right and wrong ones in turn as long as there
            are both, and none of a question whose answers are all alike (docs/decisions/0051).
        num_continuations: Continuations from every step.
        rules: How solutions are taken apart.
        threshold: A step is labelled right if a larger share of its continuations is.
        max_chance: Questions that a guess answers as often or more often are left out.
        sampling: How continuations are drawn. Every step gets a seed of its own.
        increments: Position step of visual tokens; the model's if None.
    """

    store: Path
    out: Path
    num_solutions: int = 4  # VisualPRM
    choose: Choice = "first"  # VisualPRM
    num_continuations: int = 16  # VisualPRM
    rules: StepRules = field(default_factory=StepRules)
    threshold: float = 0.0  # VisualPRM
    max_chance: float = 0.05  # ours: docs/decisions/0027
    sampling: SamplingParams = field(default_factory=_sampling)
    increments: Increments | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            ConfigError: If a number is out of range.
        """
        for name in ("num_solutions", "num_continuations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.choose == "balanced" and self.num_solutions < 2:
            raise ConfigError(
                "num_solutions is 1, of which nothing can be balanced; ask for 2 or more"
            )
        if not 0 <= self.threshold < 1:
            raise ConfigError(
                f"threshold is {self.threshold}; it is a share of continuations, from 0 to below 1"
            )
        if not 0 < self.max_chance <= 1:
            raise ConfigError(f"max_chance is {self.max_chance}; it must be above 0, at most 1")

    def settings(self) -> dict[str, Any]:
        """What the data depend on; folders may move."""
        values = asdict(self)
        return {name: values[name] for name in values if name not in ("store", "out")}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessReport:
    """What became of the questions.

    Attributes:
        outcomes: Questions by what came of them, of all attempts: ``used``, ``guessable``,
            ``open`` (no reference), ``no_solution`` (no finished one with steps), ``one_sided``
            (all right or all wrong, where solutions are balanced).
        num_solutions: Judged solutions.
        num_right: Those of them that end in the right answer.
        num_steps: Their steps.
        num_minus: Steps that are labelled wrong.
        num_continuations: Continuations that were drawn.
        num_tokens: Tokens of these.
        num_prompt_tokens: Tokens that they continue.
        num_cached_tokens: Those of them that were computed already.
        skipped: Solutions that cannot be written or continued, by kind of fault.
        failures: Questions that cannot be worked on; the next attempt tries them again.
        meta: Meta file to train with; None if there is no solution.
    """

    outcomes: Mapping[str, int]
    num_solutions: int
    num_right: int
    num_steps: int
    num_minus: int
    num_continuations: int
    num_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    skipped: Mapping[str, int]
    failures: tuple[DataError | RequestError, ...]
    meta: Path | None
