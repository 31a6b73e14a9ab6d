"""What runs leave in their folders, and an end that nobody asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cascadevl.train.checkpoint import latest
from cascadevl.train.loop import TrainState

FILES = ("weights", "optimiser", "rank-00000")


def crashing_at(step: int) -> Callable[[TrainState[Any]], None]:
    """An evaluation that ends the run after a step; before that it draws, as it may."""

    def crash(state: TrainState[Any]) -> None:
        torch.rand(3)  # the run must not notice
        if state.step == step:
            raise MemoryError("as if the machine had none left")

    return crash


def logged(out: Path) -> list[dict[str, float]]:
    """The lines of a run's log."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def timeless(lines: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The lines without what depends on the machine."""
    return [{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in lines]


def final_tensors(out: Path, step: int, files: Sequence[str] = FILES) -> dict[str, Tensor]:
    """All tensors of a run's last checkpoint, which is that of a step, as ``file:name``."""
    path = latest(out / "checkpoints")
    assert path is not None
    assert path.name == f"checkpoint-{step:08d}"
    return {
        f"{name}:{key}": tensor
        for name in files
        for key, tensor in safetensors.torch.load_file(path / f"{name}.safetensors").items()
    }


def differing(one: Path, other: Path, step: int, files: Sequence[str] = FILES) -> list[str]:
    """Tensors of the last checkpoints of two runs that are not the same to the last bit."""
    before, after = (final_tensors(out, step, files) for out in (one, other))
    assert before.keys() == after.keys()
    return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
