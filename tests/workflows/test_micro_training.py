"""The order of micro's stages with a tiny model: what starts from what, and what is not redone."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.workflows.small_nano import small_config, tokenizer

import cascadevl
from cascadevl.errors import ConfigError, TrainingError
from cascadevl.train import start as train_start
from cascadevl.train.config import TrainConfig
from cascadevl.train.run import TrainResult
from cascadevl.workflows import micro, micro_training

SCALE = 1e-6  # two steps a stage


@pytest.fixture(scope="module", autouse=True)
def small() -> Generator[None, None, None]:
    """A few thousand parameters, rows of a few samples, one question a row of the suite."""
    stage_config = micro.stage_config

    def small_stage(stage: str, out: Path, **settings: Any) -> TrainConfig:
        config = stage_config(stage, out, **settings)
        batch = replace(config.batch, row_tokens=2048, buffer_rows=1, row_samples=2)
        return replace(config, batch=batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro, "tokenizer", tokenizer)
        patch.setattr(micro, "stage_config", small_stage)
        patch.setattr(train_start, "micro_config", small_config)
        patch.setattr(micro_training, "CURVE_QUESTIONS", 1)
        patch.setattr(micro_training, "ANSWER_TOKENS", 4)
        yield


def run(out: Path, *stages: str) -> Path:
    return micro_training.run(
        out, stages=stages or tuple(micro.STAGES), steps_scale=SCALE, console=Console(quiet=True)
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("micro") / "run"
    assert run(out) == out / "anneal" / "model"
    return out


def test_every_stage_leaves_a_model(trained: Path) -> None:
    for stage in micro.STAGES:
        model, _ = cascadevl.load(trained / stage / "model")
        assert model.config.text_config.hidden_size == 32
    noted = json.loads((trained / "course.json").read_text())
    assert list(noted["points"]) == ["pretrain", "sft", "anneal"]
    assert set(noted["points"]["sft"]["2"]) == {row.name for row in micro.suite(1)}


def test_the_whole_begins_with_both_trained_halves(trained: Path) -> None:
    joined, _ = cascadevl.load(trained / micro_training.JOINED)
    for stage, half in (("reading", "vision_tower"), ("decoder", "language_model")):
        model, _ = cascadevl.load(trained / stage / "model")
        wanted = model.model.get_submodule(half).state_dict()
        for name, tensor in joined.model.get_submodule(half).state_dict().items():
            assert torch.equal(tensor, wanted[name]), name


def test_reading_goes_on_with_the_tower_and_leaves_the_rest(trained: Path) -> None:
    before, _ = cascadevl.load(trained / "vision" / "model")
    after, _ = cascadevl.load(trained / "reading" / "model")
    changed = {
        name.split(".")[1]
        for (name, one), two in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(one, two)
    }
    assert changed == {"vision_tower"}
    assert micro.pages("reading").tiles
    assert not micro.pages("vision").tiles


def test_what_is_done_is_not_done_again(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(micro_training, "_train")
    assert run(trained) == trained / "anneal" / "model"
    assert run(trained, "vision") == trained / "vision" / "model"


def test_a_stage_needs_what_it_starts_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage sft needs .*pretrain.model, which is not there"):
        run(tmp_path, "sft")
    with pytest.raises(ConfigError, match=r"decoder.model and .*reading.model"):
        run(tmp_path, "pretrain")
    names = "vision, reading, decoder, pretrain, sft, anneal"
    with pytest.raises(ConfigError, match=f"the stages are {names}; not rl"):
        run(tmp_path, "rl")


def test_a_stage_that_was_stopped_is_told(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = TrainResult(
        steps=1, finished=False, loss=None, counters={}, skipped={}, model_path=None
    )
    monkeypatch.setattr(micro_training, "pretrain", lambda *args, **settings: stopped)
    with pytest.raises(TrainingError, match="stopped in decoder after step 1; the same command"):
        run(tmp_path, "decoder")
