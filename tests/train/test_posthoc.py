from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.small_run import QUIET, small_config, sources, tokenizer

import cascadevl
from cascadevl.data.mixture import WeightedSource
from cascadevl.errors import ConfigError
from cascadevl.tasks.base import TaskSource
from cascadevl.tasks.text import Text
from cascadevl.train.loop import TrainState
from cascadevl.train.posthoc import JOINT, WARMUP, PosthocConfig, WarmupConfig, posthoc, warmup_of
from cascadevl.types import Batch

TEXTS = WeightedSource(
    source=TaskSource(task=Text(difficulty="easy", num_questions=2), length=64, stage="sft"),
    weight=1.0,
)


def both(*, weight: float = 1.0) -> list[WeightedSource]:
    return [*(dataclasses.replace(one, weight=weight) for one in sources()), TEXTS]


def config(out: Path, **values: Any) -> PosthocConfig:
    whole = small_config(out, data__mixture="internvl3", data__mixture_examples=8, **values)
    keys = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
    return PosthocConfig(**keys, warmup=WarmupConfig(num_steps=3, lr=1e-2))


def test_only_the_projector_moves_in_the_warm_up_and_everything_afterwards(tmp_path: Path) -> None:
    from cascadevl.train.start import from_scratch

    settings = config(tmp_path)
    start, _ = from_scratch(settings.model, tokenizer(), seed=settings.run.seed)
    before = {name: value.clone() for name, value in start.named_parameters()}
    result = posthoc(settings, sources=both(), tokenizer=tokenizer(), console=QUIET)
    warm, _ = cascadevl.load(tmp_path / WARMUP / "model", dtype=torch.float32)
    joint, _ = cascadevl.load(tmp_path / JOINT / "model", dtype=torch.float32)
    assert result.model_path == tmp_path / JOINT / "model"
    middle = dict(warm.named_parameters())
    for name, value in middle.items():
        moved = not torch.equal(value, before[name])
        assert moved == ("multi_modal_projector" in name), name
    vision = "model.vision_tower.encoder.layer.0.attention.q_proj.weight"
    text = "model.language_model.layers.0.self_attn.q_proj.weight"
    for name, value in joint.named_parameters():
        if name in (vision, text):
            assert not torch.equal(value, middle[name]), name


def test_the_warm_up_sees_pictures_alone_and_the_second_stage_the_mixture(tmp_path: Path) -> None:
    seen: dict[str, list[str]] = {WARMUP: [], JOINT: []}

    def note(state: TrainState[Batch]) -> None:
        stream: Any = state.stream
        frozen = not next(state.model.parameters()).requires_grad
        seen[WARMUP if frozen else JOINT] += [
            name for batch in [next(stream)] for name in batch.sources
        ]

    settings = config(tmp_path, run__eval_interval=1, run__num_steps=8)
    posthoc(settings, sources=both(), tokenizer=tokenizer(), on_step=note, console=QUIET)
    assert seen[WARMUP]
    assert not [name for name in seen[WARMUP] if name.startswith("text/")]
    assert [name for name in seen[JOINT] if name.startswith("text/")]
    assert [name for name in seen[JOINT] if not name.startswith("text/")]


def test_a_stopped_run_goes_on_in_its_stage_and_ends_as_an_uninterrupted_one(
    tmp_path: Path,
) -> None:
    whole = posthoc(
        config(tmp_path / "whole"), sources=both(), tokenizer=tokenizer(), console=QUIET
    )
    assert whole.model_path is not None
    calls = 0

    def stop(state: TrainState[Batch]) -> None:
        nonlocal calls
        del state
        calls += 1
        if calls in (2, 5):  # once in each stage
            signal.raise_signal(signal.SIGTERM)

    parts = config(tmp_path / "parts", run__eval_interval=1, run__resume=True)
    results = [
        posthoc(parts, sources=both(), tokenizer=tokenizer(), on_step=stop, console=QUIET)
        for _ in range(3)
    ]
    assert [result.finished for result in results] == [False, False, True]
    expected, _ = cascadevl.load(whole.model_path)
    model, _ = cascadevl.load(tmp_path / "parts" / JOINT / "model")
    for (name, value), other in zip(expected.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_it_needs_pictures(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of the 1 data sets has any"):
        posthoc(config(tmp_path), sources=[TEXTS], tokenizer=tokenizer(), console=QUIET)


def test_the_warm_up_has_a_rate_of_its_own_and_no_weights_of_texts(tmp_path: Path) -> None:
    settings = config(tmp_path)
    name = sources()[0].source.name
    weights = {name: 2.0, TEXTS.source.name: 1.0}
    settings = dataclasses.replace(
        settings, data=dataclasses.replace(settings.data, weights=weights)
    )
    warm = warmup_of(settings, sources())
    assert (warm.optim.lr, warm.optim.muon_lr, warm.run.num_steps) == (1e-2, None, 3)
    assert dict(warm.data.weights) == {name: 2.0}
    assert warm.data.mixture == "as_given"
    with pytest.raises(ConfigError, match="use the stage pretrain"):
        WarmupConfig(num_steps=0)


@pytest.mark.parametrize("of_the_run", [{"run__accumulation": 3}, {"run__global_batch": 6}])
def test_the_warm_up_has_steps_and_rows_of_its_own(
    tmp_path: Path, of_the_run: dict[str, int]
) -> None:
    settings = config(tmp_path, **of_the_run)
    same = warmup_of(settings, sources())
    assert (same.run.accumulation, same.run.global_batch) == (
        settings.run.accumulation,
        settings.run.global_batch,
    )
    assert (same.data.max_tokens, same.batch) == (settings.data.max_tokens, settings.batch)
    own = dataclasses.replace(settings.warmup, global_batch=4, max_tokens=200)
    warm = warmup_of(dataclasses.replace(settings, warmup=own), sources())
    assert (warm.run.accumulation, warm.run.global_batch) == (None, 4)
    assert (warm.data.max_tokens, warm.batch.row_tokens) == (200, 200)
    for wrong in ({"global_batch": 0}, {"max_tokens": 0}):
        with pytest.raises(ConfigError, match=f"warmup.{next(iter(wrong))} is 0"):
            WarmupConfig(**wrong)
