"""Work that is killed at any moment, again and again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable


def killed(work: Callable[[Callable[[int], None]], None], after_s: float) -> tuple[set[int], bool]:
    """Do some work in a process of its own, and kill that with SIGKILL.

    Args:
        work: Calls what it is given with the number of each part that is finished.
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
