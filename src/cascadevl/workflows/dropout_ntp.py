"""DropoutNTP: a rejected answer that begins like the chosen one and goes on without the picture.

MMPR (arXiv 2411.10442, section 3): where no reference says what is right, an answer to a picture is
better than one whose second half was written blind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from cascadevl.data.preferences import first_part, preferred, shows_a_picture, without_pictures
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.backends import Backend
from cascadevl.engine.offline import seed_of
from cascadevl.engine.requests import Request
from cascadevl.errors import DataError, RequestError
from cascadevl.types import Message, Rollout
from cascadevl.workflows.preference_config import PreferenceConfig

Pair: TypeAlias = tuple[Rollout, int, str, str]
"""A question, which of its answers, and the chosen and the rejected text."""


@dataclass(frozen=True, slots=True)
class _Begun:
    """An answer whose beginning is to be continued."""

    rollout: Rollout
    order: int
    chosen: str
    kept: str


@dataclass(frozen=True, slots=True)
class Rejections:
    """Makes rejected answers.

    Attributes:
        config: How much of an answer is kept, and how the rest is sampled.
        processor: Makes prompts for the backend.
        backend: Continues answers.
    """

    config: PreferenceConfig
    processor: CascadeVLProcessor
    backend: Backend

    def of(self, rollouts: Sequence[Rollout], counts: Counter[str]) -> Iterator[Pair]:
        """Pairs of a group of questions, all continued at once, in the order of the questions.

        Args:
            rollouts: The questions with their answers.
            counts: Counts what cannot be used, as ``dropped/REASON``.
        """
        begun: list[_Begun] = []
        requests: list[Request] = []
        for each in self._beginnings(rollouts, counts):
            try:
                requests.append(self._request(each))
            except (DataError, RequestError) as error:
                kind = error.kind if isinstance(error, DataError) else "refused"
                counts[f"dropped/{kind}"] += 1
            else:
                begun.append(each)
        rest: dict[int, str] = {}
        for number, outcome in self.backend.answer(requests):
            if isinstance(outcome, RequestError):
                counts["dropped/refused"] += 1
            else:
                rest[number] = outcome[0].text
        for number, each in enumerate(begun):
            if number not in rest:
                continue
            rejected = each.kept + rest[number]
            if rejected.strip() == each.chosen.strip():
                counts["dropped/same"] += 1
            else:
                yield each.rollout, each.order, each.chosen, rejected

    def _beginnings(self, rollouts: Sequence[Rollout], counts: Counter[str]) -> Iterator[_Begun]:
        for rollout in rollouts:
            if rollout.metric and self.config.dropout == "open":
                continue
            if not shows_a_picture(rollout.prompt):
                counts["dropped/no_picture"] += 1
                continue
            answers = preferred(rollout, self.config.num_dropout)
            counts["dropped/no_answer"] += not answers
            for order, answer in enumerate(answers):
                kept = first_part(answer.text, self.config.kept_share)
                if not kept:
                    counts["dropped/too_short"] += 1
                elif self._is_in_reasoning(kept):
                    counts["dropped/in_reasoning"] += 1
                else:
                    yield _Begun(rollout, order, answer.text, kept)

    def _is_in_reasoning(self, kept: str) -> bool:
        """Whether a text ends within reasoning that the template would close."""
        has_channel = self.processor.template.reasoning is not None
        return has_channel and "<think>" in kept and "</think>" not in kept

    def _request(self, begun: _Begun) -> Request:
        name = f"{begun.rollout.problem_id}/drop/{begun.order}"
        turns = (*without_pictures(begun.rollout.prompt), Message.of("assistant", begun.kept))
        sampling = self.config.sampling
        return Request(
            prompt=self.processor.builder.prompt(turns, end="open", source=name),
            sampling=replace(sampling, seed=seed_of(self.config.seed, name)),
        )
