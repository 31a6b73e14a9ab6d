"""The model that comes with the package: there, small, named, and as good as its card says."""

from __future__ import annotations

import torch

import cascadevl
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import run_suite
from cascadevl.model.loading import find
from cascadevl.model.shipped import CARD, edition
from cascadevl.workflows import micro
from cascadevl.workflows.micro_shipping import MAX_BYTES

SURE = ("numbers", "easy-VQA", "is there", "how many", "additions")
"""Rows that the card puts at 95 % or more."""


def test_it_is_small_and_has_a_card_and_an_edition() -> None:
    folder = find("micro")
    assert sum(file.stat().st_size for file in folder.iterdir()) < MAX_BYTES
    number = edition(folder)
    assert number is not None
    assert f"# micro, edition {number}\n" in (folder / CARD).read_text("utf-8")


def test_it_answers_what_its_card_says() -> None:
    model, processor = cascadevl.load("micro", dtype=torch.bfloat16)
    assert 3e6 < sum(parameter.numel() for parameter in model.parameters()) < 10e6
    rows = [row for row in micro.suite(12) if row.label in SURE]
    assert len(rows) == len(SURE)
    responder = ModelResponder(model=model, processor=processor, max_new_tokens=96)
    scores = run_suite(responder, rows, split="test", seed=31)
    right = sum(each.right for score in scores for each in score.answered)
    # 60 questions at 95 % or more: fewer than 50 right would be no accident.
    assert right >= 50, {score.label: score.estimate.value for score in scores}
