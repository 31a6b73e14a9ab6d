"""Measures losses in processes that are killed at random moments: ``python -m ... FOLDER``.

A program of its own because it forks, which a process with threads must not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from tests.killing import attempts

from cascadevl.train.loss_journal import Drawn, TileLosses, measured_losses
from cascadevl.train.tile_losses import Losses
from cascadevl.types import NO_PARENT, Example

NUMBER, CHUNK, KILLS = 60, 3, 25


class Alone:
    """A run of one process."""

    process_index, num_processes = 0, 1

    def wait_for_everyone(self) -> None:
        pass


class MadeUp(Drawn):
    """Draw i has i % 3 tiles."""

    def __init__(self) -> None:
        pass

    def dataset(self, position: int) -> str:
        return "made up"

    def __call__(self, position: int) -> Example:
        number = position % 3
        return Example(
            source=str(position),
            record_id=str(position),
            input_ids=np.array([1]),
            trained=np.array([True]),
            segments=np.array([0]),
            parents=(NO_PARENT,),
            tiles=np.zeros((number, 4, 4, 3), dtype=np.uint8),
            tiles_per_image=(number,) if number else (),
            increments=(1.0,) if number else (),
        )


def losses_of(example: Example) -> Losses:
    number = int(example.record_id)
    more = tuple(number / 7 + tile for tile in range(example.num_tiles))
    return Losses(full=number / 7, compressed=more, tokens=number)


def write(folder: Path, tell: Callable[[int], None]) -> list[TileLosses]:
    def measure(examples: Sequence[Example]) -> list[Losses]:
        time.sleep(0.01)
        for example in examples:
            tell(int(example.record_id))
        return [losses_of(example) for example in examples]

    return measured_losses(
        MadeUp(),
        measure,
        Alone(),
        folder=folder,
        settings={"seed": 0},
        num_draws=NUMBER,
        chunk=CHUNK,
        console=Console(quiet=True),
    )


def main() -> None:
    folder = Path(sys.argv[1])
    whole = write(folder / "whole", lambda number: None)
    assert [each.position for each in whole] == list(range(NUMBER))
    parts = folder / "parts"
    begun: list[int] = []
    num_killed = 0
    for started, ended in attempts(lambda tell: write(parts, tell), KILLS, 0.04, least=5):
        begun += sorted(started)
        num_killed += not ended
    # An end costs at most the chunk that was in hand.
    twice = len(begun) - len(set(begun))
    assert twice <= num_killed * CHUNK, (twice, num_killed)
    assert write(parts, lambda number: sys.exit("measured again")) == whole


if __name__ == "__main__":
    main()
