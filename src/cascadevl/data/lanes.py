"""Which record of a stream a draw takes, and how a run finds it again.

A stream cannot be asked for record i. So position p of the mixture takes from lane p modulo the
number of lanes, and of that lane the next record: as many come before it as draws of the stream
stand at earlier positions of the same lane. That is a function of p alone, like every other
draw. Processes that draw every n-th position read lanes of their own where n divides the number
of lanes; otherwise some lanes are read by several of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from cascadevl.data.source import StreamedSource
from cascadevl.types import Record

LanesState: TypeAlias = list[list[Any]]
"""Of every lane in use: its number, a position, the records before it, a place of the reader."""

POSITIONS_APART = 64
"""Positions of a lane between two that are remembered."""


class Lanes:
    """The lanes of one stream within a mixture."""

    def __init__(
        self, source: StreamedSource, key: int, number: int, drawn_from: Callable[[int], int]
    ) -> None:
        """Read nothing yet.

        Args:
            source: The stream.
            key: Which order.
            number: The stream's number within the mixture.
            drawn_from: Number of the source that a position draws from.
        """
        self._num_lanes, self._reader = source.num_lanes, source.open(key)
        self._number, self._drawn_from = number, drawn_from
        # (position, draws of the stream at earlier positions of the lane), ascending
        self._known = [[(lane, 0)] for lane in range(self._num_lanes)]
        self._last = [(lane, 0) for lane in range(self._num_lanes)]

    def record(self, position: int) -> Record:
        """The record that a position draws, which must be one of this stream.

        Raises:
            DataError: If the record cannot be used.
            TrainingError: If the stream cannot be read on.
        """
        lane = position % self._num_lanes
        return self._reader.read(lane, self._ordinal(lane, position))

    def state(self, oldest: int) -> LanesState:
        """Where every lane in use stands, and forget what lies before.

        Args:
            oldest: No position before it will be asked for again.
        """
        state = []
        for lane, known in enumerate(self._known):
            if self._last[lane] == (lane, 0):
                continue
            number = _before(known, oldest)
            self._known[lane] = [known[0], *known[max(number, 1) :]]
            position, ordinal = known[number]
            state.append([lane, position, ordinal, self._reader.mark(lane, ordinal)])
        return state

    def return_to(self, state: LanesState) -> None:
        """Know of every lane its start and the place of a state, and nothing else."""
        places = {lane: (position, ordinal, place) for lane, position, ordinal, place in state}
        for lane in range(self._num_lanes):
            position, ordinal, place = places.get(lane, (lane, 0, None))
            start = (lane, 0)
            self._known[lane] = [start] if position == lane else [start, (position, ordinal)]
            self._last[lane] = self._known[lane][-1]
            self._reader.return_to(lane, place)

    def _ordinal(self, lane: int, position: int) -> int:
        """Draws of the stream at earlier positions of a lane."""
        known = self._known[lane]
        start = known[_before(known, position)]
        if start[0] <= self._last[lane][0] <= position:
            start = self._last[lane]
        at, ordinal = start
        while at < position:
            ordinal += self._drawn_from(at) == self._number
            at += self._num_lanes
            if at - known[-1][0] >= POSITIONS_APART * self._num_lanes:
                known.append((at, ordinal))
        self._last[lane] = (at, ordinal)
        return ordinal


def merged(states: Iterable[Mapping[str, LanesState]], oldest: int) -> dict[str, LanesState]:
    """One state of the states of several processes.

    Args:
        states: What `Mixture.places` gave in each of them.
        oldest: No position before it will be asked for again; of each lane, the last place that
            is not behind it is kept.
    """
    kept: dict[str, dict[int, list[Any]]] = {}
    for state in states:
        for name, lanes in state.items():
            own = kept.setdefault(name, {})
            for place in lanes:
                own[place[0]] = _better(own.get(place[0], place), place, oldest)
    return {name: [own[lane] for lane in sorted(own)] for name, own in kept.items()}


def _better(one: list[Any], other: list[Any], oldest: int) -> list[Any]:
    early, late = sorted((one, other), key=lambda place: int(place[1]))
    return late if late[1] <= oldest else early


def _before(known: list[tuple[int, int]], position: int) -> int:
    """Index of the last known position that is not behind this one."""
    return max(bisect_right(known, position, key=lambda place: place[0]) - 1, 0)
