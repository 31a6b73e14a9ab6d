"""Packing: nothing lost, nothing twice, limits kept, and rows well filled."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadevl.data.packing import FixedRows, Packer, Row, Size, size_of
from cascadevl.errors import ConfigError, DataError
from cascadevl.types import NO_PARENT, Example


def pack(packer: Packer[int], sizes: list[Size], start: int = 0) -> list[Row[int]]:
    return [
        row
        for number, size in enumerate(sizes, start)
        for row in packer.add(number, size, position=number)
    ]


def contents(rows: list[Row[int]]) -> list[list[int]]:
    return [row.items for row in rows]


def test_a_sample_joins_the_row_it_fills_best() -> None:
    packer: Packer[int] = Packer(10, 4, 3)
    assert pack(packer, [Size(8, 0), Size(6, 0), Size(7, 0)]) == []
    # rows with 2, 4 and 3 tokens of room: a sample of 3 goes where it leaves none
    assert contents(pack(packer, [Size(3, 0)], start=3)) == [[2, 3]]
    assert contents(packer.flush()) == [[0], [1]]


def test_tiles_count_as_room_too() -> None:
    packer: Packer[int] = Packer(10, 4, 3)
    pack(packer, [Size(6, 3), Size(5, 0)])
    # by tokens alone the first row would be the better fit, but it has room for one tile only
    pack(packer, [Size(4, 2)], start=2)
    assert contents(packer.flush()) == [[1, 2], [0]]


def test_the_fullest_row_leaves_first() -> None:
    packer: Packer[int] = Packer(10, 4, 2)
    assert contents(pack(packer, [Size(6, 0), Size(9, 0), Size(8, 0)])) == [[1]]
    assert contents(pack(packer, [Size(7, 0)], start=3)) == [[2]]


def test_a_full_row_leaves_at_once_but_one_full_of_tiles_still_takes_text() -> None:
    packer: Packer[int] = Packer(10, 4, 5)
    assert contents(pack(packer, [Size(10, 0)])) == [[0]]
    assert pack(packer, [Size(6, 4)], start=1) == []
    assert contents(pack(packer, [Size(4, 0)], start=2)) == [[1, 2]]


@pytest.mark.parametrize("size", [Size(11, 0), Size(1, 5)])
def test_a_sample_larger_than_a_row_is_refused_with_both_numbers(size: Size) -> None:
    packer: Packer[int] = Packer(10, 4)
    with pytest.raises(DataError) as caught:
        packer.add(0, size, position=0)
    assert caught.value.kind == "too_long"
    assert f"{size.tokens} tokens and {size.tiles} tiles" in str(caught.value)
    assert "10 tokens and 4 tiles" in str(caught.value)
    assert packer.flush() == []


def test_impossible_limits_are_refused() -> None:
    for limits in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            Packer(*limits)
    with pytest.raises(ConfigError, match="samples_per_row is 0"):
        FixedRows(0)


sizes_strategy = st.lists(
    st.builds(Size, st.integers(1, 20), st.integers(0, 6)), min_size=1, max_size=60
)


@given(sizes_strategy, st.integers(1, 5))
def test_nothing_lost_nothing_twice_limits_kept(sizes: list[Size], buffer_rows: int) -> None:
    packer: Packer[int] = Packer(20, 6, buffer_rows)
    rows = pack(packer, sizes)
    assert len(packer.state_dict()["rows"]) <= buffer_rows
    rows += packer.flush()
    assert sorted(item for row in rows for item in row.items) == list(range(len(sizes)))
    for row in rows:
        assert row.items == row.positions
        assert row.tokens == sum(sizes[item].tokens for item in row.items) <= 20
        assert row.tiles == sum(sizes[item].tiles for item in row.items) <= 6
    assert packer.fill.rows == len(rows)
    assert packer.fill.tokens == sum(size.tokens for size in sizes)
    assert packer.fill.tiles == sum(size.tiles for size in sizes)


@given(sizes_strategy, st.data())
def test_resumed_equals_uninterrupted(sizes: list[Size], data: st.DataObject) -> None:
    stop = data.draw(st.integers(0, len(sizes)))
    one: Packer[int] = Packer(20, 6, 3)
    before = pack(one, sizes[:stop])
    state = json.loads(json.dumps(one.state_dict()))
    other: Packer[int] = Packer(20, 6, 3)
    other.load_state_dict(state, lambda position: (position, sizes[position]))
    after = [pack(packer, sizes[stop:], start=stop) + packer.flush() for packer in (one, other)]
    assert after[0] == after[1]
    assert one.fill == other.fill
    whole: Packer[int] = Packer(20, 6, 3)
    assert before + after[0] == pack(whole, sizes) + whole.flush()


def test_fixed_rows_keep_the_order() -> None:
    rows: FixedRows[int] = FixedRows(2)
    found = [rows.add(n, Size(n + 1, 1), position=n) for n in range(5)]
    assert [contents(leaving) for leaving in found] == [[], [[0, 1]], [], [[2, 3]], []]
    other: FixedRows[int] = FixedRows(2)
    other.load_state_dict(rows.state_dict(), lambda position: (position, Size(position + 1, 1)))
    for each in (rows, other):
        assert contents(each.flush()) == [[4]]
        assert each.flush() == []
        assert (each.fill.rows, each.fill.tokens, each.fill.tiles) == (3, 15, 5)


def test_size_counts_expanded_slots() -> None:
    example = Example(
        source="s",
        record_id="r",
        input_ids=np.array([1, 9, 2, 9, 3]),
        trained=np.zeros(5, dtype=bool),
        segments=np.zeros(5, dtype=np.int64),
        parents=(NO_PARENT,),
        tiles=np.zeros((4, 2, 2, 3), dtype=np.uint8),
        tiles_per_image=(3, 1),
        increments=(1.0, 0.5),
    )
    assert size_of(example, tokens_per_tile=16) == Size(tokens=3 + 4 * 16, tiles=4)


class PublicPacker:
    """The rule of the public code, for comparison: by tiles, and most tiles leave first."""

    def __init__(self, max_tokens: int, max_tiles: int, buffer_rows: int) -> None:
        self.limits, self.buffer_rows = (max_tokens, max_tiles), buffer_rows
        self.open: list[list[int]] = []

    def add(self, size: Size) -> list[list[int]]:
        max_tokens, max_tiles = self.limits
        self.open.sort(key=lambda row: -row[1])
        for row in self.open:
            if row[1] + size.tiles <= max_tiles and row[0] + size.tokens <= max_tokens:
                break
        else:
            row = [0, 0]
            self.open.append(row)
        row[0] += size.tokens
        row[1] += size.tiles
        leaving = []
        if row[0] == max_tokens or row[1] == max_tiles:
            leaving.append(row)
        elif len(self.open) > self.buffer_rows:
            leaving.append(max(self.open, key=lambda row: row[1]))
        self.open = [row for row in self.open if not any(row is other for other in leaving)]
        return leaving


def simulated(text_share: float, *, text_tokens: int, num: int) -> list[Size]:
    """Log-normal lengths; an image is 13 tiles of 256 tokens and a shorter text."""
    rng = np.random.default_rng(0)
    sizes = []
    for _ in range(num):
        is_text = rng.random() < text_share
        tokens = int(rng.lognormal(np.log(text_tokens if is_text else 300), 1.2)) + 1
        sizes.append(
            Size(min(tokens, 32768), 0) if is_text else Size(min(tokens, 8000) + 13 * 256, 13)
        )
    return sizes


@pytest.mark.parametrize(
    ("text_share", "text_tokens", "least", "least_gain"),
    [(0.25, 1500, 0.97, 0.06), (1.0, 4000, 0.995, 0.0)],
    ids=["mixed", "text"],
)
def test_rows_are_well_filled(
    text_share: float, text_tokens: int, least: float, least_gain: float
) -> None:
    sizes = simulated(text_share, text_tokens=text_tokens, num=4000)
    packer: Packer[int] = Packer(32768, 96, 20)
    pack(packer, sizes)
    public = PublicPacker(32768, 96, 20)
    rows = [row for size in sizes for row in public.add(size)]
    share = packer.fill_shares()[0]
    assert share >= least
    assert share >= sum(row[0] for row in rows) / (32768 * len(rows)) + least_gain


def test_fill_shares_on_paper() -> None:
    packer: Packer[Any] = Packer(10, 4)
    assert packer.fill_shares() == (0, 0)
    pack(packer, [Size(6, 1), Size(9, 2)])
    packer.flush()
    assert packer.fill_shares() == (15 / 20, 3 / 8)
