"""Which questions online RL learns from: those that a model answers right now and then.

MMPR-Tiny (InternVL3.5 report, Cascade RL) keeps the queries whose accuracy over the rollouts that
exist anyway is from 0.2 to 0.8. Where all answers of a group are right, or none is, there is no
advantage, and nothing is learned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cascadevl.data.rollouts import StoredRollouts
from cascadevl.data.writing import image_paths, problem_fields
from cascadevl.errors import ConfigError, DataError

LEAST_ACCURACY, MOST_ACCURACY = 0.2, 0.8
"""Range of accuracy, both ends included (InternVL3.5 report)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterReport:
    """What became of the questions.

    Attributes:
        num_kept: Questions written.
        num_too_hard: Those below the range.
        num_too_easy: Those above it.
        num_unsolved: Of those that are too hard, the ones without a single right answer.
        num_mastered: Of those that are too easy, the ones without a single wrong answer.
        num_open: Questions without a reference, which have no accuracy.
        skipped: Questions that could not be written, by kind of error.
    """

    num_kept: int
    num_too_hard: int
    num_too_easy: int
    num_unsolved: int
    num_mastered: int
    num_open: int
    skipped: Mapping[str, int]


@dataclass(slots=True)
class _Tally:
    """Answers to one question, of all weights that answered it."""

    place: int
    num_answers: int = 0
    num_correct: int = 0

    @property
    def accuracy(self) -> float:
        return self.num_correct / max(1, self.num_answers)


def filter_queries(
    store: Path, out: Path, *, least: float = LEAST_ACCURACY, most: float = MOST_ACCURACY
) -> FilterReport:
    """Write the questions of a store that are neither too hard nor too easy.

    The file is one that `cascadevl.tasks.problems.FileProblems` reads: each line has the question
    as it was asked, without the system message, its reference and how answers are compared.

    Args:
        store: Folder of the rollouts.
        out: The file, written whole or not at all.
        least: Lowest accuracy over all answers to a question.
        most: Highest accuracy.

    Raises:
        ConfigError: If no accuracy is in the range.
        DataError: If the store cannot be read.
    """
    if not 0.0 <= least <= most <= 1.0:
        raise ConfigError(
            f"the range of accuracies is {least} to {most}; 0 <= least <= most <= 1 must hold"
        )
    stored = StoredRollouts(store)
    tallies: dict[str, _Tally] = {}
    open_questions: set[str] = set()
    for place, rollout in enumerate(stored):
        if not rollout.metric:
            open_questions.add(rollout.problem_id)
            continue
        tally = tallies.setdefault(rollout.problem_id, _Tally(place))
        tally.num_answers += len(rollout.answers)
        tally.num_correct += sum(answer.correct for answer in rollout.answers)
    kept = [tally for tally in tallies.values() if least <= tally.accuracy <= most]
    skipped = _write(stored, kept, out)
    shares = [tally.accuracy for tally in tallies.values()]
    return FilterReport(
        num_kept=len(kept) - sum(skipped.values()),
        num_too_hard=sum(share < least for share in shares),
        num_too_easy=sum(share > most for share in shares),
        num_unsolved=sum(share < least and share == 0.0 for share in shares),
        num_mastered=sum(share > most and share == 1.0 for share in shares),
        num_open=len(open_questions),
        skipped=skipped,
    )


def _write(stored: StoredRollouts, kept: list[_Tally], out: Path) -> dict[str, int]:
    skipped: dict[str, int] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for tally in kept:
            rollout = stored[tally.place]
            try:
                fields = problem_fields(
                    rollout.prompt[-1],
                    rollout.reference,
                    record_id=rollout.problem_id,
                    images=image_paths(rollout.prompt),
                    metric=rollout.metric,
                    choices=dict(rollout.choices),
                )
            except DataError as error:
                skipped[error.kind] = skipped.get(error.kind, 0) + 1
                continue
            fields["accuracy"] = round(tally.accuracy, 4)
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")
    partial.replace(out)
    return skipped
