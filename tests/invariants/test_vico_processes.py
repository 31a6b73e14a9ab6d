"""ViCO on two processes takes the steps of one: loss, what is recorded of each view, reference."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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


def run_as_two(folder: Path, reference: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = (
        "import sys; from pathlib import Path; from tests.invariants import test_vico_processes as "
        f"t; t.run(Path(sys.argv[1]), {reference!r})"
    )
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(folder)],
            cwd=Path(__file__).parents[2],
            env={
                **os.environ,
                **shared,
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(rank),
                "RANK": str(rank),
            },
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=250) for process in processes] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["copy", "stored"])
def test_two_processes_take_the_steps_of_one(tmp_path: Path, reference: str) -> None:
    """Kills: means of views over one process alone, or a mean of the processes' means."""
    mpo_config(tmp_path / "unused", tmp_path / "start")  # random weights
    run(tmp_path, reference)
    run_as_two(tmp_path, reference)
    alone, together = (
        [
            json.loads(line)
            for line in (tmp_path / f"of-{count}-{reference}" / "metrics.jsonl")
            .read_text()
            .splitlines()
        ]
        for count in (1, 2)
    )
    views = set()
    for first, second in zip(alone, together, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            if not name.endswith("_per_s"):
                assert value == pytest.approx(second[name], rel=1e-3, abs=1e-5), name
        views |= {name for name in first if name.startswith("kl_")}
    assert views >= {"kl_full", "kl_compressed", "kl_text"}
    if reference == "stored":
        parts = [
            len(list((tmp_path / f"of-{count}-stored" / "reference").glob("part-*")))
            for count in (1, 2)
        ]
        assert parts == [3, 3]
