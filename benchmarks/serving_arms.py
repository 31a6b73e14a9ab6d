"""The servers that bench_serving.py compares, as processes pinned to cores.

Their cores are theirs alone as far as it goes: the client runs where there is room.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TextIO

from serving_client import NAME

_PEER = Path(__file__).with_name("serving_peer.py")
_START_S = 300.0

Kind = Literal["transformers", "coupled", "decoupled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A server.

    Attributes:
        kind: Which program.
        cores: Of the whole server; of a decoupled one, the vision half's and the language half's.
        threads: Of each half.
        weights: How the language half holds its weights.
        cache_bytes: For its keys and values; None for what the program takes.
    """

    kind: Kind
    cores: tuple[int, ...]
    threads: int = 1
    weights: str = "stored"
    cache_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """A running server.

    Attributes:
        address: Its base address.
        pids: Its processes.
    """

    address: str
    pids: tuple[int, ...]

    def resident_bytes(self) -> int:
        """Memory of all its processes together."""
        pages = (Path(f"/proc/{pid}/statm").read_text().split()[1] for pid in self.pids)
        return sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def running(arm: Arm, checkpoint: Path, *, batch_invariant: bool = False) -> Iterator[Served]:
    """Run a server while the context lasts.

    Args:
        arm: Which.
        checkpoint: That it serves.
        batch_invariant: Whether its answers are equal whatever else is answered.
    """
    more = ["--batch-invariant"] if batch_invariant else []
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="bench-"))
        log = stack.enter_context((Path(folder) / "errors").open("w"))
        if arm.kind == "transformers":
            words = [str(_PEER), str(checkpoint), "--threads", str(arm.threads)]
            started = [stack.enter_context(_process(words, arm.cores, log, listens=True))]
        else:
            serve = ["-m", "cascadevl.cli.main", "serve", str(checkpoint)]
            serve += ["--log", f"{folder}/requests"]
            front = [*serve, "--name", NAME, "--port", "0"]
            members = _members(arm, [*serve, *more], folder)
            own = ["--wire", f"ipc://{folder}/front"] if members else [*_computing(arm), *more]
            started = [stack.enter_context(_process([*front, *own], arm.cores, log, listens=True))]
            for words, core in members:
                started.append(stack.enter_context(_process(words, (core,), log)))
        line = started[0].stdout.readline() if started[0].stdout else ""
        name, _, address = line.strip().partition(" at ")
        assert name == NAME, f"no server: {(Path(folder) / 'errors').read_text()[-3000:]}"
        _wait(address.removesuffix("/v1") + "/ready")
        try:
            yield Served(address, tuple(process.pid for process in started))
        finally:
            for process in started:  # all at once, or those that are left miss the others
                process.terminate()


def _computing(arm: Arm) -> list[str]:
    words = ["--threads", str(arm.threads), "--weights", arm.weights]
    return words if arm.cache_bytes is None else [*words, "--cache-bytes", str(arm.cache_bytes)]


def _members(arm: Arm, serve: Sequence[str], folder: str) -> list[tuple[list[str], int]]:
    """The two halves of a decoupled server, each with its core."""
    if arm.kind != "decoupled":
        return []
    join = ["--join", f"ipc://{folder}/front"]
    vision = [*serve, *join, "--role", "vision", "--threads", str(arm.threads)]
    language = [*serve, *join, "--role", "language", *_computing(arm)]
    language += ["--features", f"ipc://{folder}/language"]
    return [(vision, arm.cores[0]), (language, arm.cores[-1])]


@contextmanager
def _process(
    words: Sequence[str], cores: Sequence[int], log: TextIO, *, listens: bool = False
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE if listens else None,
        stderr=log,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, set(cores)),
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(url: str) -> None:
    """Wait until a server takes requests."""
    end = time.monotonic() + _START_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < end, f"{url} is not ready after {_START_S:g} s"
            time.sleep(0.2)
