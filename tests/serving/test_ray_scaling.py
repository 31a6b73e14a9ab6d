"""Replicas that Ray adds and takes away by what they have in hand; answers stay what they are.

Slow, and needs Ray, see `test_ray_app`.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from tests.serving.small_command import EXACT, ask, command, coupled_answers, free_port
from tests.serving.small_ray import ray_python, replicas
from tests.serving.small_server import until

NUM = 10


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Let a process do nothing while the context lasts."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def num_joined(log: Path) -> int:
    """Language servers that have joined the front so far."""
    said = {json.loads(line)["message"] for line in log.read_text().splitlines()}
    return sum(line.startswith("front: language-") and line.endswith("joined") for line in said)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_load_brings_another_replica_and_rest_takes_one_away(tmp_path: Path):
    python, log = ray_python(), tmp_path / "log"
    expected = coupled_answers(NUM)
    words = ["--ray", "--wire", f"tcp://127.0.0.1:{free_port()}", "--replica-cpus", "0.1"]
    words += ["--max-language", "2", "--load", "2", "--log", str(log), *EXACT]
    words += ["--cache-bytes", "64MB"]
    with (
        command(*words, python=python) as (process, client),
        ThreadPoolExecutor(NUM) as pool,
    ):
        asking = partial(ask, client)
        assert asking(0) == expected[0]
        (first,) = replicas("language")

        end = time.monotonic() + 1200
        while num_joined(log) < 2:
            assert time.monotonic() < end, "no second replica has joined"
            assert list(pool.map(asking, range(NUM))) == expected
        both = set(replicas("language"))
        assert len(both) == 2
        with frozen(first):  # the other one must answer now
            assert list(pool.map(asking, range(NUM))) == expected
            assert set(replicas("language")) == both

        until(lambda: len(replicas("language")) == 1, 600)
        assert list(pool.map(asking, range(NUM))) == expected
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0
