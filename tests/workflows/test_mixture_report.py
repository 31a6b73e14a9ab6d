"""Choosing among candidates over several seeds, with every number worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from cascadevl.data.modality import Modality
from cascadevl.workflows.mixture_report import (
    Candidate,
    Outcome,
    Trial,
    best,
    lead,
    markdown,
    write_tables,
)

MODALITIES: dict[str, Modality] = {"web": "text", "charts": "multimodal", "ocr": "multimodal"}


def outcome(name: str, losses: list[tuple[float, float, float]], right: list[float]) -> Outcome:
    """A candidate with a trial for each triple of losses of web, charts and ocr."""
    trials = [
        Trial(
            seed=seed,
            steps=10,
            tokens=1000 + seed,
            losses=dict(zip(MODALITIES, triple, strict=True)),
            accuracies={"charts": right[seed], "ocr": 0.5} if right else {},
        )
        for seed, triple in enumerate(losses)
    ]
    candidate = Candidate(
        stage="ratio",
        name=name,
        weights={},
        shares={"web": 0.5, "charts": 0.3, "ocr": 0.2},
        ratio=name,
    )
    return Outcome(candidate=candidate, trials=trials, modalities=MODALITIES)


LOW = outcome("1:3", [(2.0, 0.5, 0.2), (2.2, 0.5, 0.2)], [0.2, 0.4])
HIGH = outcome("1:1", [(1.9, 0.8, 0.2), (2.1, 0.8, 0.2)], [0.6, 0.6])
WORST = outcome("9:1", [(3.0, 1.0, 1.0), (3.0, 1.0, 1.0)], [0.0, 0.0])


def test_text_and_multimodal_data_count_half_each() -> None:
    (trial, _) = LOW.trials
    by_hand = 0.5 * math.log(2.0) + 0.5 * (math.log(0.5) + math.log(0.2)) / 2
    assert trial.log_loss(MODALITIES) == pytest.approx(by_hand)
    second = 0.5 * math.log(2.2) + 0.5 * (math.log(0.5) + math.log(0.2)) / 2
    assert LOW.loss == pytest.approx(math.exp((by_hand + second) / 2))
    # within one modality, as in the first stage, it is the plain geometric mean
    only = Trial(seed=0, steps=1, tokens=1, losses={"charts": 0.5, "ocr": 0.2})
    assert only.log_loss(MODALITIES) == pytest.approx(math.log(math.sqrt(0.5 * 0.2)))


def test_the_best_depends_on_what_is_asked_for() -> None:
    every = [WORST, HIGH, LOW]
    assert best(every, "loss") is LOW
    assert best(every, "accuracy") is HIGH
    assert HIGH.accuracy == pytest.approx((0.55 + 0.55) / 2)
    assert outcome("x", [(1.0, 1.0, 1.0)], []).accuracy is None
    assert best([HIGH, HIGH, LOW], "accuracy") is HIGH


def test_the_lead_is_compared_seed_by_seed() -> None:
    ahead = lead([WORST, HIGH, LOW], "loss")
    assert ahead is not None
    name, difference, error = ahead
    pairs = [0.5 * math.log(1.9 / 2.0) + 0.25 * math.log(0.8 / 0.5)]
    pairs += [0.5 * math.log(2.1 / 2.2) + 0.25 * math.log(0.8 / 0.5)]
    assert name == "1:1"
    assert difference == pytest.approx(sum(pairs) / 2)
    assert error == pytest.approx(abs(pairs[0] - pairs[1]) / 2)  # of two values, sd / sqrt(2)
    ahead = lead([WORST, HIGH, LOW], "accuracy")
    assert ahead is not None
    assert ahead[0] == "1:3"
    assert ahead[1] == pytest.approx((0.2 + 0.1) / 2)
    assert lead([LOW], "loss") is None


def test_the_table_shows_shares_losses_and_the_lead() -> None:
    lines = markdown([WORST, HIGH, LOW], "loss").splitlines()
    row = next(line for line in lines if line.startswith("| 1:3 **chosen** |"))
    assert row.split(" | ")[1:] == [
        "0.500, 2.1000",
        "0.300, 0.5000",
        "0.200, 0.2000",
        f"{LOW.loss:.4f}",
        "30.0 %",
        "50.0 %",
        "40.0 %",
        "1,000 |",
    ]
    assert "1:3 is ahead of 1:1 by 9." in lines[-1] or "1:3 is ahead of 1:1 by 9." in lines[-2]
    alone = markdown([LOW], "loss")
    assert "There was one candidate." in alone


def test_the_tables_hold_the_same_and_json_has_no_nan(tmp_path: Path) -> None:
    one_seed = [outcome("1:3", [(2.0, 0.5, 0.2)], []), outcome("1:1", [(3.0, 0.5, 0.2)], [])]
    write_tables(one_seed, tmp_path / "table.md", "loss")
    content = json.loads(
        (tmp_path / "table.json").read_text("utf-8"), parse_constant=lambda name: pytest.fail(name)
    )
    (stage,) = content["stages"]
    assert (stage["chosen"], stage["lead"]["next"]) == ("1:3", "1:1")
    assert stage["lead"]["difference"] == pytest.approx(0.5 * math.log(1.5))
    assert stage["lead"]["standard_error"] is None
    assert stage["candidates"][0]["trials"][0]["losses"]["web"] == 2.0
    text = (tmp_path / "table.md").read_text("utf-8")
    assert "by 20.27 % in the mean loss." in text
    assert "right" not in text
