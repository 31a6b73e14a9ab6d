"""Work that is killed at any moment, again and again."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

Work: TypeAlias = Callable[[Callable[[int], None]], object]
"""Calls what it is given with the number of each part that is finished."""


def attempts(
    work: Work, kills: int, most_s: float, *, least: int, seed: int = 0
) -> Iterator[tuple[set[int], bool]]:
    """Do some work in processes that are killed at random moments, and in one that is left alone.

    Args:
        work: The work; every attempt goes on with what those before have left.
        kills: Attempts that are killed, unless they have ended by then.
        most_s: How long they live at most.
        least: How many of them must not come to their end, for the test to say something.
        seed: Of the moments.

    Yields:
        Of each attempt the parts that it called finished, and whether it came to its end.
    """
    chance, num_killed = random.Random(seed), 0
    for _ in range(kills):
        finished, ended = killed(work, chance.uniform(0.0, most_s))
        num_killed += not ended
        yield finished, ended
    assert num_killed >= least, f"too few attempts were killed: {num_killed} of {kills}"
    finished, ended = killed(work, 300.0)
    assert ended
    yield finished, ended


def killed(work: Work, after_s: float) -> tuple[set[int], bool]:
    """Do some work in a process of its own, and kill that with SIGKILL.

    Args:
        work: The work.
        after_s: When it is killed, unless it has ended by then.

    Returns:
        The parts that it called finished, and whether it came to its end.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            work(lambda number: _tell(writing, number))
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    ended = _wait(child, after_s)
    if ended is None:
        os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)[1]
    with os.fdopen(reading) as file:
        finished = {int(line) for line in file}
    assert ended in (0, signal.SIGKILL), f"the work failed with status {ended}"
    return finished, ended == 0


def _tell(writing: int, number: int) -> None:
    os.write(writing, f"{number}\n".encode())


def _wait(child: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.0005)
    return None
