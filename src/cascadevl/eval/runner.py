"""Asking a suite's questions and scoring the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cascadevl.eval.responder import Responder
from cascadevl.eval.suite import Asked, Baseline, SuiteRow, draw_row, most_frequent
from cascadevl.scoring.metrics import Estimate, accuracy
from cascadevl.tasks.base import Split, to_prompt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answered:
    """A question with the answer given.

    Attributes:
        asked: The question.
        response: What the responder said.
        right: Whether that is right.
    """

    asked: Asked
    response: str
    right: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Score:
    """One row's result.

    Attributes:
        row: Its name.
        label: Its short name.
        estimate: Share of right answers with its 95 % interval.
        baseline: What the most frequent answer scores on the same questions.
        answered: Every question with its answer.
    """

    row: str
    label: str
    estimate: Estimate
    baseline: Baseline
    answered: tuple[Answered, ...]


def run_suite(
    responder: Responder, suite: Sequence[SuiteRow], *, split: Split = "test", seed: int
) -> list[Score]:
    """Ask every question of a suite, all in one call, and score row by row.

    Args:
        responder: Who answers.
        suite: The rows.
        split: Which part of the material.
        seed: Seed of the scenes; the same seed gives the same questions.

    Raises:
        ValueError: If two rows have the same name, or a row cannot be drawn.
    """
    names = [row.name for row in suite]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two rows of the suite are named {twice[0]!r}; names must differ")
    drawn = [draw_row(row, split=split, seed=seed) for row in suite]
    every = [asked for row in drawn for asked in row]
    responses = responder([to_prompt(asked.scene, asked.question) for asked in every])
    answered = [
        Answered(asked=asked, response=response, right=asked.question.check(response))
        for asked, response in zip(every, responses, strict=True)
    ]
    scores: list[Score] = []
    for row, asked_of_row in zip(suite, drawn, strict=True):
        own = tuple(each for each in answered if each.asked.row == row.name)
        scores.append(
            Score(
                row=row.name,
                label=row.label,
                estimate=accuracy([each.right for each in own]),
                baseline=most_frequent(asked_of_row),
                answered=own,
            )
        )
    return scores
