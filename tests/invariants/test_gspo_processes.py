"""A GSPO run of two processes: the questions of one, shared, and the same updates."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.train import small_gspo

NUM_STEPS = 4


def run(out: Path, start: Path) -> None:
    small_gspo.run(out, start, run__num_steps=NUM_STEPS, run__checkpoint_interval=0)


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one(tmp_path: Path) -> None:
    start = small_gspo.write_start(tmp_path)
    run(tmp_path / "one", start)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = (
        "import sys; from pathlib import Path; "
        "from tests.invariants import test_gspo_processes as t; "
        "t.run(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "two"), str(start)],
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
    one, two = (small_gspo.logged(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == NUM_STEPS
    for alone, together in zip(one[:2], two[:2], strict=True):  # the very same first answers
        assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)
    assert two[1]["reward"] == pytest.approx(one[1]["reward"])
    assert two[1]["skipped_groups"] == pytest.approx(one[1]["skipped_groups"])
    assert two[0]["ratio"] == pytest.approx(1.0, abs=1e-12)
