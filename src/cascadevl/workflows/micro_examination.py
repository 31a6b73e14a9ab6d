"""The final examination of micro: several sets of held-out questions, and what bounds the scores.

The result is JSON, so that it can travel with a model: `cascadevl.workflows.micro_shipping` makes
the model card of it, and refuses the scores of other weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cascadevl.eval.digit_ceiling import numbers_read
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import Score, run_suite
from cascadevl.eval.suite import SuiteRow, most_frequent
from cascadevl.model.loading import find, load
from cascadevl.scoring.metrics import Estimate, accuracy
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.workflows import micro
from cascadevl.workflows.micro_training import ANSWER_TOKENS

SEEDS = (2024, 2025, 2026)
"""Seeds of the questions; none is used while micro is trained."""

NUM_QUESTIONS = 400
"""Of each row and seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScore:
    """One row over all seeds.

    Attributes:
        row: Its name.
        short: Its name where there is little room.
        estimate: Share of right answers with its 95 % interval, all seeds together.
        seeds: Share of right answers of each seed.
        baseline: What always giving the most frequent answer scores.
        baseline_answer: That answer.
        ceiling: What a support vector machine that is given the same digits one by one scores;
            None where the row is not about reading handwritten numbers.
    """

    row: str
    short: str
    estimate: Estimate
    seeds: tuple[float, ...]
    baseline: float
    baseline_answer: str
    ceiling: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What a model scored.

    Attributes:
        weights: Checksum of the examined weights (`weights_checksum`).
        num_questions: Of each row and seed, each about a picture of its own.
        seeds: Seeds of the questions.
        rows: The scores.
    """

    weights: str
    num_questions: int
    seeds: tuple[int, ...]
    rows: tuple[RowScore, ...]

    def json(self) -> str:
        """Everything as JSON on one line."""
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str) -> Examination:
        """The examination that `json` wrote."""
        values: dict[str, Any] = json.loads(text)
        rows = tuple(
            RowScore(
                **row
                | {
                    "estimate": Estimate(**row["estimate"]),
                    "seeds": tuple(row["seeds"]),
                    "ceiling": None if row["ceiling"] is None else Estimate(**row["ceiling"]),
                }
            )
            for row in values["rows"]
        )
        return cls(**values | {"rows": rows, "seeds": tuple(values["seeds"])})


def examine(
    model: str | Path,
    *,
    num_questions: int = NUM_QUESTIONS,
    seeds: Sequence[int] = SEEDS,
    suite: Callable[[int], Sequence[SuiteRow]] = micro.suite,
    progress: Callable[[str], None] = lambda line: None,
) -> Examination:
    """Ask a model all questions, in the precision it is shipped in.

    Args:
        model: Its folder, or its name.
        num_questions: Of each row and seed.
        seeds: Seeds of the questions.
        suite: The rows, for a number of questions.
        progress: Is told what was done.

    Raises:
        CheckpointError: If the model cannot be loaded.
    """
    folder = find(model)
    loaded, processor = load(folder, dtype=torch.bfloat16)
    responder = ModelResponder(model=loaded, processor=processor, max_new_tokens=ANSWER_TOKENS)
    rows = suite(num_questions)
    of_seeds: list[list[Score]] = []
    for number, seed in enumerate(seeds, start=1):
        of_seeds.append(run_suite(responder, rows, seed=seed))
        progress(f"questions of seed {seed} answered ({number} of {len(seeds)})")
    return Examination(
        weights=weights_checksum(folder),
        num_questions=num_questions,
        seeds=tuple(seeds),
        rows=tuple(
            _row_score(row, [scores[number] for scores in of_seeds], seeds)
            for number, row in enumerate(rows)
        ),
    )


def known(file: Path, model: Path, num_questions: int) -> Examination | None:
    """An examination that was written before, if it was this one; None otherwise.

    Args:
        file: Where it would be.
        model: Folder of the model.
        num_questions: Of each row and seed.
    """
    if not file.is_file():
        return None
    found = Examination.of_json(file.read_text("utf-8"))
    same = found.weights == weights_checksum(model) and found.num_questions == num_questions
    return found if same else None


def weights_checksum(folder: Path) -> str:
    """SHA-256 over all tensors of a checkpoint in bfloat16, whatever files they lie in."""
    model, _ = load(folder, dtype=torch.bfloat16)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def table(examination: Examination) -> str:
    """The scores as a Markdown table."""
    lines = [
        "| question | most frequent answer | right, 95 % interval | by seed | SVM on the digits |",
        "|---|---|---|---|---|",
    ]
    for row in examination.rows:
        seeds = ", ".join(f"{100 * share:.1f}" for share in row.seeds)
        ceiling = "" if row.ceiling is None else in_percent(row.ceiling)
        lines.append(
            f"| {row.row} | {100 * row.baseline:.1f} ({row.baseline_answer}) "
            f"| {in_percent(row.estimate)} | {seeds} | {ceiling} |"
        )
    return "\n".join(lines) + "\n"


def in_percent(estimate: Estimate) -> str:
    """A share and its interval, for example ``84.2 (80.3-87.6)``."""
    low, high = 100 * estimate.low, 100 * estimate.high
    return f"{100 * estimate.value:.1f} ({low:.1f}-{high:.1f})"


def _row_score(row: SuiteRow, scores: Sequence[Score], seeds: Sequence[int]) -> RowScore:
    answered = [each for score in scores for each in score.answered]
    baseline = most_frequent([each.asked for each in answered])
    ceiling = None
    if isinstance(row.task, Handwriting) and {each.asked.question.kind for each in answered} == {
        "number"
    }:
        ceiling = _ceiling(row.task, scores, seeds)
    return RowScore(
        row=row.name,
        short=row.label,
        estimate=accuracy([each.right for each in answered]),
        seeds=tuple(score.estimate.value for score in scores),
        baseline=baseline.share,
        baseline_answer=baseline.answer,
        ceiling=ceiling,
    )


def _ceiling(task: Handwriting, scores: Sequence[Score], seeds: Sequence[int]) -> Estimate:
    """The share of the very same numbers that a reader of single scans gets right as a whole."""
    right: list[bool] = []
    for score, seed in zip(scores, seeds, strict=True):
        asked = [each.asked for each in score.answered]
        indices = [int(each.scene.scene_id.rpartition(":")[2]) for each in asked]
        pairs = numbers_read(task, split="test", seed=seed, indices=indices)
        assert [written for _, written in pairs] == [each.question.answer for each in asked]
        right += [said == written for said, written in pairs]
    return accuracy(right)
