"""Teaching a vision tower: the loss by hand, learning, exact resume, and a model that goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from cascadevl.errors import ConfigError
from cascadevl.model.loading import load
from cascadevl.tasks.pages import CLASSES, Pages
from cascadevl.train.config import BatchConfig, DataConfig, ModelConfig, TrainConfig
from cascadevl.train.loop import RunConfig, TrainState
from cascadevl.train.optim import OptimConfig
from cascadevl.train.run import TrainResult
from cascadevl.train.vision import NOTHING_WEIGHT, PATCHES, PageBatch, PageStream, pretrain_vision
from cascadevl.workflows import nano

PAGES = Pages(px=112)


def run(out: Path, num_steps: int, *, resume: bool = False, stop_after: int = 0) -> TrainResult:
    config = TrainConfig(
        model=ModelConfig(preset="nano", precision="float32"),
        data=DataConfig(prefetch=0),
        batch=BatchConfig(packing="count", row_samples=4),
        optim=OptimConfig(name="muon", lr=2e-3, schedule="constant"),
        run=RunConfig(
            num_steps=num_steps, out=out, resume=resume, checkpoint_interval=2, eval_interval=1
        ),
    )

    def stop(state: TrainState[PageBatch]) -> None:
        if state.step == stop_after:
            raise KeyboardInterrupt

    return pretrain_vision(
        config,
        pages=PAGES,
        num_classes=len(CLASSES),
        tokenizer=nano.tokenizer(),
        on_step=stop,
        console=Console(quiet=True),
    )


class Fixed(torch.nn.Module):
    """Answers with given logits."""

    def __init__(self, classes: torch.Tensor, centres: torch.Tensor) -> None:
        super().__init__()
        self.logits = classes, centres

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.logits


def test_loss_equals_the_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(2, 3, 4, generator=generator)
    centres = torch.randn(2, 3, generator=generator)
    batch = PageBatch(
        tiles=torch.zeros(2, 14, 14, 3, dtype=torch.uint8),
        classes=torch.tensor([[0, 1, 3], [2, 0, 0]]),
        centres=torch.tensor([[False, True, True], [False, False, True]]),
        sources=("a", "b"),
    )
    total, weight_sum = 0.0, 0.0
    for page in range(2):
        for patch in range(3):
            target = int(batch.classes[page, patch])
            weight = NOTHING_WEIGHT if target == 0 else 1.0
            logits = classes[page, patch].double().numpy()
            nll = np.log(np.exp(logits).sum()) - logits[target]
            there = 1 / (1 + np.exp(-float(centres[page, patch])))
            nll -= np.log(there if batch.centres[page, patch] else 1 - there)
            total += weight * nll
            weight_sum += weight
    assert PATCHES.weigh(batch) == pytest.approx(weight_sum)
    terms = PATCHES.loss(Fixed(classes, centres), batch, weight_sum)
    assert float(terms.loss) == pytest.approx(total / weight_sum, rel=1e-5)


def test_processes_share_the_pages_out() -> None:
    alone = PageStream(PAGES, 4, 0, 1)
    one, two = PageStream(PAGES, 2, 0, 2), PageStream(PAGES, 2, 1, 2)
    for _ in range(2):
        assert next(alone).sources == next(one).sources + next(two).sources


def test_a_stopped_run_goes_on_bit_for_bit_and_leaves_a_model(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 6)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", 6, stop_after=5)
    parts = run(tmp_path / "parts", 6, resume=True)
    assert whole.model_path is not None
    assert parts.model_path is not None
    first, _ = load(str(whole.model_path), dtype=torch.float32)
    second, _ = load(str(parts.model_path), dtype=torch.float32)
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert whole.loss == parts.loss
    # Only the tower has learned.
    fresh, _ = load(str(run(tmp_path / "fresh", 1).model_path), dtype=torch.float32)
    same = {
        name.split(".")[1]
        for (name, one), two in zip(first.named_parameters(), fresh.parameters(), strict=True)
        if torch.equal(one, two)
    }
    assert "vision_tower" not in same
    assert {"language_model", "multi_modal_projector"} <= same


def test_it_learns(tmp_path: Path) -> None:
    losses = [run(tmp_path / str(steps), steps).loss for steps in (1, 25)]
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[1] < 0.9 * losses[0]


def test_a_trained_tower_is_gone_on_with(tmp_path: Path) -> None:
    first = run(tmp_path / "first", 2)
    config = TrainConfig(
        model=ModelConfig(path=str(first.model_path), precision="float32"),
        data=DataConfig(prefetch=0),
        batch=BatchConfig(packing="count", row_samples=4),
        run=RunConfig(num_steps=1, out=tmp_path / "second", checkpoint_interval=2),
    )
    second = pretrain_vision(
        config, pages=PAGES, num_classes=len(CLASSES), console=Console(quiet=True)
    )
    before, _ = load(str(first.model_path), dtype=torch.float32)
    after, _ = load(str(second.model_path), dtype=torch.float32)
    fresh, _ = load(str(run(tmp_path / "fresh", 1).model_path), dtype=torch.float32)
    name = "model.vision_tower.encoder.layer.0.attention.q_proj.weight"
    moved = (after.get_parameter(name) - before.get_parameter(name)).abs().mean()
    away = (fresh.get_parameter(name) - before.get_parameter(name)).abs().mean()
    assert 0 < moved < away


def test_a_model_without_preset_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(run=replace(RunConfig(), out=tmp_path))
    with pytest.raises(ConfigError, match=r"give model\.preset"):
        pretrain_vision(config, pages=PAGES, num_classes=2, tokenizer=nano.tokenizer())
