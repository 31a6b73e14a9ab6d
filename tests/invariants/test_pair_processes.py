"""MPO on two processes takes the steps of one: loss, metrics, reward shift, reference."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tests.processes import shared_by
from tests.train.run_folders import logged
from tests.train.small_pairs import mpo_config, pairs
from tests.train.small_run import QUIET

from cascadevl.train.checkpoint import latest, load
from cascadevl.train.mpo import mpo

COMPARED = ("loss", "grad_norm", "margin", "accuracy", "kl", "reward_shift", "pairs")


def run(folder: Path, before_use: bool) -> None:
    """One process of a run, or all of it: four pairs a step either way."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = mpo_config(
        folder / f"of-{world_size}-{before_use}",
        folder / "start",
        run__num_steps=4,
        run__accumulation=2 // world_size,
        mpo__update_before_use=before_use,
    )
    assert mpo(config, sources=pairs(), console=QUIET).finished
    if world_size > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("before_use", [False, True])
def test_two_processes_take_the_steps_of_one(tmp_path: Path, before_use: bool) -> None:
    run(tmp_path, before_use)
    shared_by(2, run, tmp_path, before_use)
    folders = [tmp_path / f"of-{count}-{before_use}" for count in (1, 2)]
    alone, together = map(logged, folders)
    compared = [name for name in COMPARED if not before_use or name == "pairs"]
    for first, second in zip(alone, together, strict=True):
        for name in compared:  # before use, the rewards a micro-batch meets follow the division
            assert first[name] == pytest.approx(second[name], rel=1e-3, abs=1e-5), name
    memories = []
    for folder in folders:
        path = latest(folder / "checkpoints")
        assert path is not None
        memories.append(load(path).memory)
    assert memories[0]["count"] == memories[1]["count"] == 2 * 4 * 4
    if not before_use:
        assert memories[0]["total"] == pytest.approx(memories[1]["total"], rel=1e-3)
    parts = [len(list((folder / "reference").glob("part-*"))) for folder in folders]
    assert parts == [3, 3]
