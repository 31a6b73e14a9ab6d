"""What is measured: named rows of questions, drawn from tasks, with their chance level.

A row is what a reader wants one score for ("numbers of two digits"), which is not always what a
task calls a kind. Scenes are drawn by (split, seed, index), so a suite is its own definition and
needs no files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cascadevl.tasks.base import Question, Scene, Split, Task


def any_question(question: Question) -> bool:
    """Whether a question counts: it always does."""
    del question
    return True


def of_kind(*kinds: str) -> Callable[[Question], bool]:
    """What keeps the questions of these kinds.

    Args:
        kinds: Kinds as the task names them.
    """
    return lambda question: question.kind in kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteRow:
    """One score.

    Attributes:
        name: As it stands in reports.
        task: Where its questions come from.
        num_questions: How many are asked, each about a picture of its own.
        keep: Which questions of the task count for this row.
        short: Its name where there is little room; the name itself if empty.
    """

    name: str
    task: Task
    num_questions: int
    keep: Callable[[Question], bool] = any_question
    short: str = ""

    @property
    def label(self) -> str:
        """The short name if there is one."""
        return self.short or self.name


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """One question of a suite.

    Attributes:
        row: Name of its row.
        scene: The scene it is about.
        question: The question with its reference answer.
    """

    row: str
    scene: Scene
    question: Question


def draw_row(row: SuiteRow, *, split: Split, seed: int) -> list[Asked]:
    """Draw scenes until the row has its questions, one of each scene that has any.

    Answers about one picture are right or wrong together: nineteen pictures with 21 questions
    each would tell little more than nineteen questions, while the interval supposed 400.

    Args:
        row: The row.
        split: Held-out material (``test``), or the training part for comparison.
        seed: Seed of the scenes.

    Raises:
        ValueError: If the task hardly ever asks what the row keeps, or nothing is to be asked.
    """
    asked: list[Asked] = []
    limit = 100 * row.num_questions
    for index in range(limit):
        scene = row.task.draw(split, seed, index)
        question = next(filter(row.keep, scene.questions), None)
        if question is not None:
            asked.append(Asked(row=row.name, scene=scene, question=question))
        if len(asked) == row.num_questions:
            return asked
    raise ValueError(
        f"row {row.name!r}: {limit} scenes gave {len(asked)} of {row.num_questions} questions"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The score of always giving one answer.

    Attributes:
        answer: The most frequent reference answer.
        share: How often it is right.
    """

    answer: str
    share: float


_TIED = 50
"""Of answers that are equally frequent, so many are tried."""


def most_frequent(asked: Sequence[Asked]) -> Baseline:
    """The best constant answer to some questions.

    Raises:
        ValueError: If there are no questions.
    """
    if not asked:
        raise ValueError("there is no most frequent answer to no questions")
    counts = Counter(each.question.answer for each in asked).most_common(_TIED)
    # Counted as answers are checked: "3.0" may also be right where "3" is the reference, and of
    # boxes hardly two are equal, while one that many others overlap with is right for all those.
    right = {
        answer: sum(each.question.check(answer) for each in asked)
        for answer, count in counts
        if count == counts[0][1]
    }
    answer = max(right, key=right.__getitem__)
    return Baseline(answer=answer, share=right[answer] / len(asked))
