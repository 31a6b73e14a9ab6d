"""The existence benchmark as rows of a suite, and its scores: F1, accuracy and share of yes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from cascadevl.eval.runner import Answered, Score
from cascadevl.eval.suite import SuiteRow
from cascadevl.scoring.existence import ExistenceScore, existence_score
from cascadevl.tasks.existence import NEGATIVES, Existence
from cascadevl.tasks.pope import Pope


def existence_rows(
    material: str = "shapes", *, px: int, num_questions: int
) -> tuple[SuiteRow, ...]:
    """A row for each way of drawing what is not there, about the same pictures.

    Args:
        material: A key of `cascadevl.tasks.existence.MATERIALS`.
        px: Side of the pictures.
        num_questions: Of each row, one a picture, so that answers are independent.
    """
    return tuple(
        SuiteRow(
            name=f"{material}: is there, {how}",
            short=how,
            task=Existence(px=px, difficulty=how, material=material, num_questions=1),
            num_questions=num_questions,
        )
        for how in NEGATIVES
    )


def pope_row(path: Path, images: Path) -> SuiteRow:
    """All questions of a released file as a row.

    Args:
        path: The file, as coco_pope_random.json.
        images: Folder of its pictures.

    Raises:
        DataError: If the file cannot be used.
    """
    task = Pope(path=path, images=images)
    return SuiteRow(name=path.stem, task=task, num_questions=task.num_questions)


def existence_of(score: Score, *, seed: int = 0) -> ExistenceScore:
    """The scores of a row whose answers are yes or no.

    Args:
        score: What `cascadevl.eval.runner.run_suite` gave for the row.
        seed: Of the resampling behind the intervals.
    """
    return existence_score(
        [each.response for each in score.answered],
        [each.asked.question.answer == "yes" for each in score.answered],
        [_picture(each) for each in score.answered],
        np.random.default_rng(seed),
    )


def _picture(answered: Answered) -> bytes:
    image = answered.asked.scene.image
    assert image is not None, "what is there is asked of a picture"
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()
