"""Models and demos small enough for tests: real material and stages, tiny widths, few pictures."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.loading import save
from cascadevl.model.presets import nano_config
from cascadevl.train import start as train_start
from cascadevl.train.config import ModelConfig, TrainConfig
from cascadevl.workflows import nano


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The demo's own."""
    return nano.tokenizer()


def small_config(vocab_size: int, **overrides: Any) -> CascadeVLConfig:
    """Nano's shape with a few thousand parameters."""
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64}
    return nano_config(
        vocab_size,
        vision_config=vision | {"intermediate_size": 64},
        text_config=text,
        **overrides,
    )


def save_small(folder: Path) -> Path:
    """A model of that shape with random weights, in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_start, "nano_config", small_config)
        model, processor = train_start.from_scratch(ModelConfig(preset="nano"), tokenizer(), seed=1)
    save(model.to(torch.bfloat16), processor, folder)
    return folder


def shrink(patch: pytest.MonkeyPatch, *, row_samples: int = 3) -> None:
    """Let the demo train a model of a few thousand parameters on a few pictures a step."""
    made, stage_config = tokenizer(), nano.stage_config

    def small_stage(stage: str, out: Path, *, num_steps: int, model: Path | None) -> TrainConfig:
        config = stage_config(stage, out, num_steps=num_steps, model=model)
        return replace(config, batch=replace(config.batch, row_samples=row_samples))

    patch.setattr(nano, "tokenizer", lambda: made)
    patch.setattr(train_start, "nano_config", small_config)
    patch.setattr(nano, "stage_config", small_stage)
