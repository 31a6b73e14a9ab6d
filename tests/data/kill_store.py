"""Writes a store in processes that are killed at random moments: ``python -m ... FOLDER``.

A program of its own because it forks, which a process with threads must not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.data.some_rollouts import rollout
from tests.killing import attempts

from cascadevl.data.rollouts import ROLLOUTS, StoredRollouts, open_store

NUMBER, BATCH, KILLS = 60, 3, 25


def write(folder: Path, finished: Callable[[int], None]) -> None:
    with open_store(folder, {"seed": 0}) as store:
        for first in range(0, NUMBER, BATCH):
            batch = [rollout(number) for number in range(first, first + BATCH)]
            if all(("w1", each.problem_id) in store for each in batch):
                continue
            time.sleep(0.002)
            assert store.append(batch) == BATCH, "a batch is there as a whole, or not at all"
            for number in range(first, first + BATCH):
                finished(number)


def main() -> None:
    folder = Path(sys.argv[1])
    write(folder / "whole", lambda number: None)
    parts = folder / "parts"
    done: set[int] = set()
    for finished, _ in attempts(lambda tell: write(parts, tell), KILLS, 0.02, least=5):
        assert not finished & done, "what is there is not made again"
        done |= finished
        if done:
            found = {int(name.partition(":")[2]) for _, name in StoredRollouts(parts).identities}
            assert done <= found, "what was finished is there"
    first, second = (
        sorted((each / ROLLOUTS).read_bytes().splitlines()) for each in (folder / "whole", parts)
    )
    assert first == second
    assert len(first) == NUMBER
    for name in (folder / "whole" / "images").iterdir():
        assert (parts / "images" / name.name).read_bytes() == name.read_bytes()


if __name__ == "__main__":
    main()
