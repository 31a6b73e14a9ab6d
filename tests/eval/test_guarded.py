"""The existence benchmark with and without the guard, by responders whose scores are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from tests.tasks.test_existence import LINE, write

import cascadevl
from cascadevl.engine.engine import Engine
from cascadevl.engine.engine_backend import EngineBackend
from cascadevl.engine.guard import Guard, GuardConfig
from cascadevl.eval.existence import existence_of, existence_rows, pope_row
from cascadevl.eval.guarded import Guarded, calibrated
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import run_suite
from cascadevl.eval.suite import draw_row
from cascadevl.scoring.verdicts import Limits
from cascadevl.tasks.base import to_prompt
from cascadevl.types import Message

MODEL, PROCESSOR = cascadevl.load("micro")
ROWS = existence_rows(px=224, num_questions=24)
HALF = Limits(keep=0.5, withdraw=0.5)


def yes(conversations: Sequence[Sequence[Message]]) -> list[str]:
    """Sees everything everywhere."""
    return ["Yes." for _ in conversations]


def guarded(limits: Limits, responder: object = yes) -> Guarded:
    guard = Guard(processor=PROCESSOR, config=GuardConfig(limits=limits))
    backend = EngineBackend(engine=Engine(MODEL, PROCESSOR))
    return Guarded(responder=responder, backend=backend, guard=guard)  # type: ignore[arg-type]


def test_who_says_yes_to_everything_is_mended_by_the_guard():
    for score in run_suite(yes, ROWS, seed=2):
        without = existence_of(score)
        assert (without.yes_share.value, without.recall) == (1, 1)
        assert without.accuracy.value < 0.75
    scores = run_suite(guarded(HALF), ROWS, seed=2)
    mended = [existence_of(score) for score in scores]
    assert min(each.accuracy.value for each in mended) > 0.8
    assert max(each.yes_share.value for each in mended) < 0.75
    # With one border in the middle nothing is left of the answers but the probes' opinion, which
    # is what the model says when it is asked itself.
    own = run_suite(ModelResponder(model=MODEL, processor=PROCESSOR), ROWS, seed=2)
    assert [s.estimate.value for s in own] == pytest.approx([s.accuracy.value for s in mended])


def test_limits_are_chosen_on_other_questions_and_reach_their_precision():
    asked = [each for row in ROWS for each in draw_row(row, split="train", seed=4)]
    conversations = [to_prompt(each.scene, each.question) for each in asked]
    truth = [each.question.answer == "yes" for each in asked]
    limits = calibrated(guarded(HALF), conversations, truth, precision=0.95)
    checks = [each.checks[0] for each in guarded(limits).verified(conversations)]
    kept = [label for check, label in zip(checks, truth, strict=True) if check.verdict == "kept"]
    gone = [
        label for check, label in zip(checks, truth, strict=True) if check.verdict == "withdrawn"
    ]
    assert len(kept) > 20
    assert len(gone) > 10
    assert np.mean(kept) >= 0.94
    assert np.mean(gone) <= 0.06


def test_released_files_are_a_row_whose_pictures_are_resampled_together(tmp_path: Path):
    for name in "ab":
        PIL.Image.new("RGB", (8, 8), {"a": "red", "b": "blue"}[name]).save(tmp_path / f"{name}.png")
    lines = [
        LINE | {"question_id": number, "image": f"{'ab'[number // 6]}.png", "label": label}
        for number, label in enumerate(["yes", "no"] * 6)
    ]
    row = pope_row(write(tmp_path / "coco_pope_random.json", *lines), tmp_path)
    assert (row.name, row.num_questions) == ("coco_pope_random", 12)
    (score,) = run_suite(yes, [row], seed=0)
    found = existence_of(score)
    assert found.accuracy.value == 0.5
    assert found.accuracy.low == found.accuracy.high == 0.5  # both pictures have the same share
