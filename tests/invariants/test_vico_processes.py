"""ViCO on two processes takes the steps of one: loss, what is recorded of each view, reference."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tests.processes import shared_by
from tests.train.run_folders import logged, timeless
from tests.train.small_pairs import mpo_config
from tests.train.small_run import QUIET
from tests.train.small_vico import stripes, vico_config

from cascadevl.train.vico import vico


def run(folder: Path, reference: str) -> None:
    """One process of a run, or all of it: six samples a step either way."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = vico_config(
        folder / f"of-{world_size}-{reference}",
        folder / "start",
        batch__row_samples=3,
        run__num_steps=4,
        run__accumulation=2 // world_size,
        vico__reference=reference,
    )
    assert vico(config, sources=stripes(12), console=QUIET).finished
    if world_size > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["copy", "stored"])
def test_two_processes_take_the_steps_of_one(tmp_path: Path, reference: str) -> None:
    """Kills: means of views over one process alone, or a mean of the processes' means."""
    mpo_config(tmp_path / "unused", tmp_path / "start")  # random weights
    run(tmp_path, reference)
    shared_by(2, run, tmp_path, reference)
    folders = [tmp_path / f"of-{count}-{reference}" for count in (1, 2)]
    alone, together = (timeless(logged(folder)) for folder in folders)
    views = set()
    for first, second in zip(alone, together, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert value == pytest.approx(second[name], rel=1e-3, abs=1e-5), name
        views |= {name for name in first if name.startswith("kl_")}
    assert views >= {"kl_full", "kl_compressed", "kl_text"}
    if reference == "stored":
        parts = [len(list((folder / "reference").glob("part-*"))) for folder in folders]
        assert parts == [3, 3]
