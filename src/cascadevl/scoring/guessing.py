"""How often knowing nothing gives the right answer, question by question.

Where guessing often succeeds, continuations from a wrong step end in the right answer by luck, and
the step is taken for right. So data for process rewards are made of other questions only.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cascadevl.scoring.answers import normalise

_TWO_WAYS = frozenset(("yes", "no", "true", "false"))
_SPLIT = re.compile(r"/(?:train|test)/|:")
_NUMBER = re.compile(r"[0-9]+")
FEWEST = 20
"""Questions of a kind from which on their references say how often a guess succeeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What counts of a question.

    Attributes:
        problem_id: Its identity; begins with the material it is of.
        text: Its words.
        reference: The reference answer.
        num_choices: Choices that it offers, 0 if none.
    """

    problem_id: str
    text: str
    reference: str
    num_choices: int = 0

    @property
    def kinds(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Its material, and that with its words but for numbers."""
        material = _SPLIT.split(self.problem_id, maxsplit=1)[0]
        return (material, ""), (material, _NUMBER.sub("#", self.text))


@dataclass(frozen=True, slots=True)
class Guessing:
    """The share of the most frequent reference among questions of a kind.

    Attributes:
        shares: By kind; kinds with too few questions are absent.
    """

    shares: Mapping[tuple[str, str], float]

    @classmethod
    def among(cls, questions: Iterable[Asked]) -> Guessing:
        """Learn it from many questions.

        Args:
            questions: All of them.
        """
        found: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for asked in questions:
            for kind in asked.kinds:
                found[kind][normalise(asked.reference)] += 1
        return cls(
            {
                kind: max(counts.values()) / counts.total()
                for kind, counts in found.items()
                if counts.total() >= FEWEST
            }
        )

    def chance(self, asked: Asked) -> float:
        """How often a guess answers this question, at least: 0 where nothing is known.

        Args:
            asked: The question.
        """
        chances = [self.shares.get(kind, 0.0) for kind in asked.kinds]
        if asked.num_choices:
            chances.append(1 / asked.num_choices)
        if normalise(asked.reference) in _TWO_WAYS:
            chances.append(0.5)
        return max(chances)
