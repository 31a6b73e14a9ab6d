"""A small real setting for tests of training: shapes to look at, nano, a few steps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from cascadevl.data.mixture import WeightedSource
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.tasks.base import TaskSource
from cascadevl.tasks.shapes import Shapes
from cascadevl.train.config import BatchConfig, DataConfig, ModelConfig, TrainConfig
from cascadevl.train.loop import RunConfig
from cascadevl.train.optim import OptimConfig

QUIET = Console(quiet=True)


@functools.cache
def sources() -> tuple[WeightedSource, ...]:
    """Pictures of shapes with questions."""
    return (WeightedSource(source=TaskSource(task=Shapes(px=112), length=64, stage="pretrain")),)


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The words of those questions."""
    records = [sources()[0].source[index] for index in range(20)]
    turns = [t for r in records for turns in (r.messages, *r.branches) for t in turns]
    return build_tokenizer([turn.text for turn in turns], 350)


class Given:
    """A stream of batches made before."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = iter(batches)

    def __next__(self) -> Any:
        return next(self.batches)

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, object], /) -> None:
        assert not state


def small_config(out: Path, **values: Any) -> TrainConfig:
    """A short run of nano; ``section__key=value`` replaces a value."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"preset": "nano", "precision": "float32"},
        "data": {"max_tokens": 300, "prefetch": 0},
        "batch": {"row_tokens": 300, "row_tiles": 3, "buffer_rows": 2},
        "optim": {"lr": 1e-3},
        "run": {"num_steps": 4, "checkpoint_interval": 2, "log_interval": 1},
    }
    for key, value in values.items():
        section, name = key.split("__")
        sections[section][name] = value
    return TrainConfig(
        model=ModelConfig(**sections["model"]),
        data=DataConfig(**sections["data"]),
        batch=BatchConfig(**sections["batch"]),
        optim=OptimConfig(**sections["optim"]),
        run=RunConfig(out=out, **sections["run"]),
    )
