from __future__ import annotations

import json
import math
from itertools import islice

import numpy as np
import pytest

from cascadevl.data.levelling import PATIENCE, Leveller
from cascadevl.data.packing import Packer, Row, Size
from cascadevl.errors import ConfigError


def row(position: int, tokens: int, tiles: int) -> Row[str]:
    made: Row[str] = Row()
    made.add(f"row {position}", Size(tokens, tiles), position)
    return made


def taken(leveller: Leveller[str], count: int) -> list[int]:
    return [leveller.take().positions[0] for _ in range(count)]


def test_without_a_choice_rows_leave_as_they_came() -> None:
    leveller: Leveller[str] = Leveller(1)
    leveller.add([row(0, 10, 9), row(1, 10, 0), row(2, 10, 3)])
    assert taken(leveller, 3) == [0, 1, 2]


def test_the_row_goes_that_brings_tiles_closest_to_the_usual_ratio() -> None:
    leveller: Leveller[str] = Leveller(4)
    # 40 tokens, 16 tiles: the usual row of 10 tokens has 4.
    leveller.add([row(0, 10, 9), row(1, 10, 0), row(2, 10, 3), row(3, 10, 4)])
    # excess of each alone: 5, -4, -1, 0; then from 0: 5, -4, -1; then from -1: 4, -5
    assert taken(leveller, 4) == [3, 2, 0, 1]


def test_only_the_oldest_rows_are_looked_at() -> None:
    leveller: Leveller[str] = Leveller(2)
    leveller.add([row(0, 10, 9), row(1, 10, 0), row(2, 10, 3), row(3, 10, 4)])
    assert taken(leveller, 1) == [1]


def test_enough_rows_must_wait_unless_it_is_the_end() -> None:
    leveller: Leveller[str] = Leveller(3)
    leveller.add([row(0, 10, 1), row(1, 10, 1), row(2, 10, 1)])
    assert leveller.has_next(1, is_end=False)
    assert not leveller.has_next(2, is_end=False)
    assert leveller.has_next(2, is_end=True)
    taken(leveller, 3)
    assert not leveller.has_next(1, is_end=True)


def test_no_row_waits_for_ever() -> None:
    leveller: Leveller[str] = Leveller(2)
    leveller.add([row(0, 10, 90)])
    leveller.add([row(n, 10, 1) for n in range(1, 40)])
    order = taken(leveller, 20)
    assert order.index(0) == PATIENCE * 2


def test_a_state_goes_on_exactly() -> None:
    rng = np.random.default_rng(0)
    rows = [row(n, int(rng.integers(5, 11)), int(rng.integers(0, 10))) for n in range(30)]

    def rebuild(position: int) -> tuple[str, Size]:
        return f"row {position}", Size(rows[position].tokens, rows[position].tiles)

    leveller: Leveller[str] = Leveller(5)
    leveller.add(rows[:20])
    first = taken(leveller, 7)
    state = json.loads(json.dumps(leveller.state_dict()))
    other: Leveller[str] = Leveller(5)
    other.load_state_dict(state, rebuild)
    for each in (leveller, other):
        each.add(rows[20:])
    rest = taken(leveller, 23)
    assert taken(other, 23) == rest
    assert sorted(first + rest) == list(range(30))
    assert sorted(leveller.positions()) == []


def test_processes_get_more_equal_work() -> None:
    """Eight processes of eight rows a step: the fullest is closer to the mean."""

    def tiles_of(process: int, num_rows: int) -> list[list[int]]:
        rng = np.random.default_rng(process)
        packer: Packer[str] = Packer(32768, 96, 20)
        leveller: Leveller[str] = Leveller(num_rows)
        rows: list[int] = []
        position = 0
        while len(rows) < 160:
            text = int(math.exp(rng.normal(math.log(300), 1.2))) + 20
            tiles = int(rng.choice([0, 1, 7, 13, 25], p=[0.4, 0.2, 0.2, 0.15, 0.05]))
            if text <= 8000:
                size = Size(text + 256 * tiles, tiles)
                leveller.add(packer.add("", size, position))
                position += 1
            if leveller.has_next(1, is_end=False):
                rows.append(leveller.take().tiles)
        steps = iter(rows)
        return [list(islice(steps, 8)) for _ in range(20)]

    def idle(num_rows: int) -> float:
        sums = np.array([tiles_of(process, num_rows) for process in range(8)]).sum(-1)
        return float(1 - sums.mean() / sums.max(0).mean())

    assert idle(8) < 0.8 * idle(1)


def test_a_choice_among_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="choosing among 0 rows"):
        Leveller(0)
