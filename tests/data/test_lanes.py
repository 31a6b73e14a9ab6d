"""Positions to lanes and ordinals, counted by hand; what is remembered, and what is merged."""

from __future__ import annotations

from typing import Any

import pytest

from cascadevl.data.lanes import POSITIONS_APART, Lanes, merged
from cascadevl.data.source import Source
from cascadevl.types import Record


class Reader:
    """Says which record was asked for; remembers places of ten records."""

    def __init__(self) -> None:
        self.returned: dict[int, Any] = {}

    def read(self, lane: int, ordinal: int) -> Record:
        return Record(source=f"{lane}:{ordinal}", record_id="", messages=())

    def mark(self, lane: int, ordinal: int) -> dict[str, Any] | None:
        return {"ordinal": ordinal // 10 * 10} if ordinal >= 10 else None

    def return_to(self, lane: int, place: dict[str, Any] | None) -> None:
        self.returned[lane] = place


class Stream:
    def __init__(self, num_lanes: int) -> None:
        self.name, self.num_lanes, self.reader = "s", num_lanes, Reader()

    def open(self, key: int) -> Reader:
        return self.reader

    def head(self, count: int) -> Source:
        raise NotImplementedError

    def identity(self) -> list[int]:
        return [self.num_lanes]


class Counted:
    """Two of three positions, in a pattern without a period, draw from the stream (number 1)."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, position: int) -> int:
        self.calls += 1
        return int(position * position % 7 < 5)


def by_hand(position: int, num_lanes: int) -> str:
    lane = position % num_lanes
    return f"{lane}:{sum(p * p % 7 < 5 for p in range(lane, position, num_lanes))}"


def drawn(lanes: Lanes, position: int) -> str:
    return lanes.record(position).source


@pytest.mark.parametrize("num_lanes", [1, 3, 4])
def test_a_position_takes_the_next_record_of_its_lane(num_lanes: int) -> None:
    lanes = Lanes(Stream(num_lanes), 0, 1, Counted())
    positions = [p for p in range(900) if p * p % 7 < 5]
    assert [drawn(lanes, p) for p in positions] == [by_hand(p, num_lanes) for p in positions]
    for position in (positions[500], positions[3], positions[-1], positions[0], positions[77]):
        assert drawn(lanes, position) == by_hand(position, num_lanes)


def test_going_on_looks_at_each_position_once() -> None:
    counted = Counted()
    lanes = Lanes(Stream(2), 0, 1, counted)
    for position in range(600):
        drawn(lanes, position)
    assert counted.calls == 598  # all but the last of each lane


def test_a_state_knows_a_place_near_the_oldest_position_and_spares_counting() -> None:
    lanes = Lanes(Stream(2), 0, 1, Counted())
    for position in range(1000):
        drawn(lanes, position)
    state = lanes.state(oldest=701)
    assert [place[0] for place in state] == [0, 1]
    for lane, position, ordinal, place in state:
        assert position % 2 == lane
        assert 701 - 2 * POSITIONS_APART < position <= 701
        assert by_hand(position, 2) == f"{lane}:{ordinal}"
        assert place == {"ordinal": ordinal // 10 * 10}

    counted, stream = Counted(), Stream(2)
    again = Lanes(stream, 0, 1, counted)
    again.return_to(state)
    assert stream.reader.returned == {0: state[0][3], 1: state[1][3]}
    assert [drawn(again, p) for p in (702, 703, 999)] == [by_hand(p, 2) for p in (702, 703, 999)]
    assert counted.calls < 2 * POSITIONS_APART + 200
    assert drawn(again, 5) == by_hand(5, 2)  # earlier ones are only dearer
    assert again.state(oldest=999)[0][1] == state[0][1]


def test_lanes_that_were_not_read_have_no_state() -> None:
    lanes = Lanes(Stream(4), 0, 1, Counted())
    assert lanes.state(0) == []
    drawn(lanes, 402)
    (place,) = lanes.state(402)
    assert place[0] == 2


def test_merging_keeps_of_each_lane_the_last_place_that_is_not_too_late() -> None:
    def place(lane: int, position: int) -> list[Any]:
        return [lane, position, position // 2, None]

    ranks = [
        {"s": [place(0, 40), place(1, 121)], "t": [place(0, 3)]},
        {"s": [place(0, 80), place(1, 141)]},
        {"s": [place(0, 200), place(2, 82)]},
    ]
    # of lane 0 that at 200 is behind what may be asked for; of lane 1 all are: then the earliest
    found = merged(ranks, oldest=100)
    assert found == {"s": [place(0, 80), place(1, 121), place(2, 82)], "t": [place(0, 3)]}
    assert merged(ranks[::-1], oldest=100) == found
    assert merged([], oldest=0) == {}
