"""Runs of training in processes of their own: several that share one, or one that is killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cascadevl.train.checkpoint import latest

ROOT = Path(__file__).parents[1]


def shared_by(
    number: int, run: Callable[..., None], *args: Path | str | bool, **environment: str
) -> None:
    """Call a function of a test module in so many processes at once, and see all of them succeed.

    Args:
        number: How many.
        run: What each of them calls.
        args: What it is called with.
        environment: Variables of theirs, beside those that join them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(number), **environment}
    processes = [
        subprocess.Popen(
            _command(run, args),
            cwd=ROOT,
            env={**os.environ, **shared, "LOCAL_RANK": str(rank), "RANK": str(rank)},
        )
        for rank in range(number)
    ]
    assert [process.wait(timeout=250) for process in processes] == [0] * number


def killed_after_a_checkpoint(
    out: Path, run: Callable[..., None], *args: Path | str | bool, after_s: float
) -> None:
    """Call a function of a test module in a process, and kill that when a checkpoint is there.

    Args:
        out: The run folder.
        run: What the process calls.
        args: What it is called with.
        after_s: How long it lives after its first checkpoint.
    """
    process = subprocess.Popen(_command(run, args), cwd=ROOT)
    deadline = time.monotonic() + 200
    while latest(out / "checkpoints") is None and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(after_s)
    process.kill()
    process.wait()


def _command(run: Callable[..., None], args: tuple[Path | str | bool, ...]) -> list[str]:
    module, name = run.__module__, run.__name__
    program = f"from pathlib import PosixPath; from {module} import {name}; {name}(*{args!r})"
    return [sys.executable, "-c", program]
