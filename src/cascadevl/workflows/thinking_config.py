"""How thinking data are made, and what became of the problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cascadevl.data.conversation import template_named
from cascadevl.errors import ConfigError
from cascadevl.scoring.reasoning import JUDGE_THRESHOLD, Choice, Rules


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingConfig:
    r"""How thinking data are made.

    Attributes:
        out: Folder to write.
        resume: Go on where an interrupted attempt stopped.
        own: Use the worked solutions that problems bring along.
        num_samples: Solutions asked of the responder for each problem.
        keep: Most thinking records of a problem.
        choice: Which of several good solutions those are.
        boxed: Ask for the answer within ``\boxed{}``, and require it.
        direct_ratio: Direct answers for each thinking record; 0 for none. A problem gives at most
            one; where that is too few, the meta file repeats them.
        system: Thinking system prompt; None for the template's, which is the released one.
        template: Conversation template of the models that will be trained.
        rules: What a solution must be like.
        judge_threshold: Lowest score a judge must give, of 0 to 10.
        group: Groups of problems asked together: the unit in which work is resumed.
        seed: Of sampled solutions.
    """

    out: Path
    resume: bool = False
    own: bool = True
    num_samples: int = 4
    keep: int = 1
    choice: Choice = "shortest"
    boxed: bool = False
    direct_ratio: float = 1.0
    system: str | None = None
    template: str = "internvl2_5"
    rules: Rules = field(default_factory=Rules)
    judge_threshold: float = JUDGE_THRESHOLD
    group: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work.

        Raises:
            ConfigError: If one is out of range, or the template unknown.
        """
        template_named(self.template)
        for name in ("num_samples", "keep", "group"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.direct_ratio < 0:
            raise ConfigError(f"direct_ratio is {self.direct_ratio}; it must be at least 0")
        if self.system is not None and not self.system.strip():
            raise ConfigError("the thinking system prompt is empty: nothing would tell the modes")

    @property
    def system_prompt(self) -> str:
        """The system message of thinking records."""
        return self.system or template_named(self.template).thinking_system


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingReport:
    """What became of the problems and their solutions.

    Attributes:
        num_problems: Problems asked.
        num_unsolved: Of them, those without a good solution.
        num_solutions: Solutions looked at.
        num_thinking: Thinking records written.
        num_direct: Direct records written.
        dropped: Solutions not used, by the first reason: a fault, ``unclear`` or ``no_score`` (the
            judge's), ``refused`` (by the server), ``duplicate``, or ``surplus`` (good, but more
            than were to be kept).
        skipped: Groups of problems that could not be used, by kind of error.
        meta: The meta file; None if nothing was kept.
    """

    num_problems: int
    num_unsolved: int
    num_solutions: int
    num_thinking: int
    num_direct: int
    dropped: Mapping[str, int]
    skipped: Mapping[str, int]
    meta: Path | None
