"""How preference pairs are made of a store of rollouts, and what became of the questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cascadevl.data.preferences import MANY, MAX_PAIRS, MAX_PAIRS_OF_MANY, PairRules
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import ConfigError


def _continuing() -> SamplingParams:
    return SamplingParams(temperature=1.0, max_tokens=4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceConfig:
    """How preference pairs are made.

    Attributes:
        store: Folder of the rollouts.
        out: Folder to write.
        max_pairs: Most pairs of a question; None for 15, or 3 of more than 500,000 questions, as
            MMPR has it.
        skip_entailed: Leave out pairs whose rejected final answer contains the chosen one.
        dropout: Which questions DropoutNTP serves, where there is a model for it: those without a
            reference, or all that show a picture.
        num_dropout: Most pairs of a question that DropoutNTP makes.
        kept_share: Share of the chosen answer that the rejected one begins with (MMPR: half, which
            its ablation of 0.25, 0.5 and 0.75 found best).
        sampling: How the rest of the rejected answer is sampled.
        group: Questions taken together: the unit in which work is resumed.
        seed: Of the choice of pairs, and of sampling.
    """

    store: Path
    out: Path
    max_pairs: int | None = None
    skip_entailed: bool = True
    dropout: Literal["open", "all"] = "open"
    num_dropout: int = 1
    kept_share: float = 0.5
    sampling: SamplingParams = field(default_factory=_continuing)
    group: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work.

        Raises:
            ConfigError: If one is out of range.
        """
        for name in ("num_dropout", "group"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0.0 < self.kept_share < 1.0:
            raise ConfigError(f"kept_share is {self.kept_share}; it must be between 0 and 1")
        self.rules(1)

    def rules(self, num_questions: int) -> PairRules:
        """Which pairs are made of a question's answers.

        Args:
            num_questions: Questions of the whole store.
        """
        of_many = MAX_PAIRS_OF_MANY if num_questions > MANY else MAX_PAIRS
        return PairRules(
            max_pairs=of_many if self.max_pairs is None else self.max_pairs,
            skip_entailed=self.skip_entailed,
            seed=self.seed,
        )

    def settings(self) -> dict[str, Any]:
        """What the pairs depend on; where files are is free."""
        return {name: each for name, each in asdict(self).items() if name not in ("store", "out")}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceReport:
    """What became of the questions.

    Attributes:
        outcomes: Questions by what the correctness pipeline made of them
            (`cascadevl.data.preferences.Outcome`).
        num_pairs: Pairs of a right and a wrong answer.
        num_entailed: Pairs left out because the wrong answer contains the right one.
        num_dropout: Pairs made by DropoutNTP.
        dropped: Questions and answers that DropoutNTP could not use, by reason: ``no_picture``,
            ``no_answer`` (none that ended, or none that is right), ``too_short``,
            ``in_reasoning`` (the cut falls into reasoning that has a channel of its own), ``same``
            (the model said the same without the picture), ``refused`` (by the backend), or a kind
            of `DataError`.
        skipped: Pairs that could not be written, by kind of error.
        mean_characters: Of the chosen and the rejected answers; 0 without any.
        meta: The meta file; None if there are no pairs.
    """

    outcomes: Mapping[str, int]
    num_pairs: int
    num_entailed: int
    num_dropout: int
    dropped: Mapping[str, int]
    skipped: Mapping[str, int]
    mean_characters: tuple[float, float]
    meta: Path | None
