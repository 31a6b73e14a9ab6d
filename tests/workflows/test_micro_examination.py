"""Micro examined and made ready to ship, with a tiny model in its place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from tests.workflows.small_nano import save_small

import cascadevl
from cascadevl.cli.main import main
from cascadevl.errors import CheckpointError, ConfigError
from cascadevl.eval.digit_ceiling import numbers_read
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import run_suite
from cascadevl.eval.suite import SuiteRow
from cascadevl.model.shipped import edition
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.workflows import micro, micro_shipping, micro_training
from cascadevl.workflows.micro_examination import (
    Examination,
    examine,
    in_percent,
    known,
    table,
    weights_checksum,
)
from cascadevl.workflows.micro_shipping import ship

QUESTIONS, SEEDS = 5, (3, 4)


def short_suite(num_questions: int) -> Sequence[SuiteRow]:
    """Handwritten numbers, existence and printed words."""
    rows = micro.suite(num_questions)
    return [row for row in rows if row.short in ("numbers", "is there", "words")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("micro") / "model")


@pytest.fixture(scope="module")
def scores(model: Path) -> Examination:
    return examine(model, num_questions=QUESTIONS, seeds=SEEDS, suite=short_suite)


def test_scores_are_those_of_all_seeds_together(model: Path, scores: Examination) -> None:
    loaded, processor = cascadevl.load(model, dtype=torch.bfloat16)
    responder = ModelResponder(
        model=loaded, processor=processor, max_new_tokens=micro_training.ANSWER_TOKENS
    )
    suites = [run_suite(responder, short_suite(QUESTIONS), seed=seed) for seed in SEEDS]
    for number, row in enumerate(scores.rows):
        shares = [suite[number].estimate.value for suite in suites]
        assert row.seeds == tuple(shares)
        assert row.estimate.value == pytest.approx(sum(shares) / 2)
        assert row.estimate.num == 2 * QUESTIONS
        answers = [
            each.asked.question.answer for suite in suites for each in suite[number].answered
        ]
        assert row.baseline == max(map(answers.count, answers)) / len(answers)
        assert (row.ceiling is not None) == (row.short == "numbers")


def test_the_ceiling_reads_the_very_scans_that_were_drawn() -> None:
    """Against a machine of the test's own, fitted on scikit-learn's data set."""
    data = load_digits()
    place = np.array([(data.target[:n] == digit).sum() for n, digit in enumerate(data.target)])
    train = place % 5 != 4
    pixels = np.minimum(data.images * 16, 255).astype(np.uint8).reshape(1797, 64) / 255.0
    task = Handwriting(difficulty="four", num_questions=7)
    pairs = numbers_read(task, split="test", seed=6, indices=range(40))
    for index, (_, written) in enumerate(pairs):
        answers = {each.kind: each.answer for each in task.draw("test", 6, index).questions}
        assert written == answers["number"]

    said = "".join(said for said, _ in pairs)
    scans = [each.scan for i in range(40) for each in task.draw_placed("test", 6, i)[1]]
    readings = []
    for factor in (1, 2):
        machine = SVC(C=10, gamma=factor / (64 * pixels[train].var()))
        read = machine.fit(pixels[train], data.target[train]).predict(pixels[~train])
        readings.append("".join(str(digit) for digit in read[scans]))
    assert said in readings
    assert sum(said == written for said, written in pairs) >= 35


def test_an_examination_travels_as_json(scores: Examination) -> None:
    assert Examination.of_json(scores.json()) == scores
    assert "\n" not in scores.json()


def test_a_known_examination_is_one_of_these_weights(
    model: Path, scores: Examination, tmp_path: Path
) -> None:
    file = tmp_path / "scores.json"
    assert known(file, model, QUESTIONS) is None
    file.write_text(scores.json())
    assert known(file, model, QUESTIONS) == scores
    assert known(file, model, QUESTIONS + 1) is None
    file.write_text(replace(scores, weights="0" * 64).json())
    assert known(file, model, QUESTIONS) is None


def test_what_is_shipped_is_the_model_with_a_card_of_its_scores(
    model: Path, scores: Examination, tmp_path: Path
) -> None:
    out = ship(model, tmp_path / "micro", edition=3, scores=scores)
    with safe_open(out / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    assert weights_checksum(out) == weights_checksum(model) == scores.weights
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == []
    assert edition(out) == 3
    assert examine(out, num_questions=QUESTIONS, seeds=SEEDS, suite=short_suite) == scores

    card = (out / "README.md").read_text()
    assert table(scores) in card
    for row in scores.rows:
        assert row.row in card
        assert in_percent(row.estimate) in card
    for word in ("CC BY 4.0", "MIT", "BSD-3-Clause", "DejaVu", "Aileron", "words.txt", "Apache"):
        assert word in card
    for name, plan in micro.STAGES.items():
        assert f"| {name} | {plan.num_steps:,} | {plan.row_tokens:,} |" in card


def test_shares_in_the_card_add_up(scores: Examination) -> None:
    families = micro_shipping._families()
    for stage in ("pretrain", "sft", "anneal"):
        assert sum(int(family[stage]) for family in families) == pytest.approx(100, abs=3)
    assert {"grounding", "needle"}.isdisjoint(family["name"] for family in families)


def test_scores_of_other_weights_are_refused(
    model: Path, scores: Examination, tmp_path: Path
) -> None:
    other = replace(scores, weights="0" * 64)
    with pytest.raises(ConfigError, match=r"scores are those of other weights .*000000000000"):
        ship(model, tmp_path / "micro", edition=1, scores=other)
    with pytest.raises(ConfigError, match="edition 0 is none"):
        ship(model, tmp_path / "micro", edition=0, scores=scores)
    assert not (tmp_path / "micro").exists()


def test_what_is_too_large_is_not_shipped(
    model: Path, scores: Examination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro_shipping, "MAX_BYTES", 1000)
    with pytest.raises(CheckpointError, match="at most 1,000 are shipped"):
        ship(model, tmp_path / "micro", edition=1, scores=scores)
    assert list(tmp_path.iterdir()) == []


def test_the_command_examines_once_and_ships(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[tuple[str, ...]] = []

    def trained(out: Path, *, stages: tuple[str, ...], steps_scale: float) -> Path:
        asked.append((*stages, str(steps_scale)))
        return model

    monkeypatch.setattr(micro_training, "run", trained)
    words = ["micro", "--out", str(tmp_path), "--questions", "1", "--steps-scale", "0.5"]
    assert main([*words, "--stages", "vision"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert main(words) == 0
    assert asked == [("vision", "0.5"), (*micro.STAGES, "0.5")]
    first = (tmp_path / "scores.json").read_text()
    assert len(json.loads(first)["rows"]) == len(micro.suite(1))

    capsys.readouterr()
    assert main([*words, "--ship", str(tmp_path / "micro"), "--edition", "2"]) == 0
    shown = capsys.readouterr().out
    assert "questions of seed" not in shown  # known from the call before
    assert f"ready to ship: {tmp_path / 'micro'}" in shown
    assert edition(tmp_path / "micro") == 2
    assert table(Examination.of_json(first)) in (tmp_path / "micro" / "README.md").read_text()


def test_shipping_needs_an_edition(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["micro", "--ship", "somewhere"]) == 2
    assert "--ship DIR and --edition N belong together" in capsys.readouterr().err
