"""The order in which finished rows leave: tiles and tokens keep step, so that processes do too.

Packed rows hold nearly the same number of tokens each, but one has 96 tiles and another ten, and
the processes of a step wait for the one whose vision tower had most to do. Without a word between
them they come out even if each lets its rows leave so that its own tiles follow its tokens: a few
rows wait, and the one goes next that brings their running totals closest to the usual ratio.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from cascadevl.data.packing import Row, Size, rebuild_row
from cascadevl.errors import ConfigError

T = TypeVar("T")

PATIENCE = 4
"""A row waits until at most this many times the waiting rows have gone before it."""


class Leveller(Generic[T]):
    """Rows that wait for their turn."""

    def __init__(self, num_rows: int = 1) -> None:
        """Start with no row.

        Args:
            num_rows: Rows to choose from; 1 lets them leave in the order they came.

        Raises:
            ConfigError: If there is nothing to choose from.
        """
        if num_rows < 1:
            raise ConfigError(f"choosing among {num_rows} rows is impossible; use 1 or more")
        self.num_rows = num_rows
        self._waiting: deque[Row[T]] = deque()
        self._passed: deque[int] = deque()  # for each waiting row, how often another one went
        self._tokens, self._tiles = 0, 0  # of all rows that ever came
        self._excess = 0.0  # tiles that have left beyond the usual ratio

    def __len__(self) -> int:
        """Rows that wait."""
        return len(self._waiting)

    def add(self, rows: Iterable[Row[T]]) -> None:
        """Let rows wait."""
        for row in rows:
            self._waiting.append(row)
            self._passed.append(0)
            self._tokens += row.tokens
            self._tiles += row.tiles

    def has_next(self, num_rows: int, *, is_end: bool) -> bool:
        """Whether so many rows may leave now: with enough others to choose from, or at the end."""
        if is_end:
            return bool(self._waiting)
        return len(self._waiting) >= num_rows + self.num_rows - 1

    def take(self) -> Row[T]:
        """Let one row leave: the one that was passed over too often, or the best fitting."""
        usual = self._tiles / max(self._tokens, 1)

        def excess_with(number: int) -> float:
            row = self._waiting[number]
            return self._excess + row.tiles - usual * row.tokens

        number = 0  # the oldest is the one passed most often
        if self._passed[0] < PATIENCE * self.num_rows:
            candidates = range(min(self.num_rows, len(self._waiting)))
            number = min(candidates, key=lambda each: abs(excess_with(each)))
        self._excess = excess_with(number)
        row = self._waiting[number]
        del self._waiting[number], self._passed[number]
        for earlier in range(number):
            self._passed[earlier] += 1
        return row

    def positions(self) -> list[int]:
        """Positions in the mixture of all samples that wait."""
        return [position for row in self._waiting for position in row.positions]

    def state_dict(self) -> dict[str, Any]:
        """The waiting rows by the positions of their samples, and the totals; plain JSON."""
        return {
            "rows": [list(row.positions) for row in self._waiting],
            "passed": list(self._passed),
            "totals": [self._tokens, self._tiles, self._excess],
        }

    def load_state_dict(
        self, state: dict[str, Any], rebuild: Callable[[int], tuple[T, Size]]
    ) -> None:
        """Let the same rows wait again.

        Args:
            state: What `state_dict` returned.
            rebuild: Makes the sample of a position anew, and tells its size.
        """
        self._waiting = deque(rebuild_row(positions, rebuild) for positions in state["rows"])
        self._passed = deque(state["passed"])
        self._tokens, self._tiles, self._excess = state["totals"]


NOTHING_WAITS: dict[str, Any] = {"rows": [], "passed": [], "totals": [0, 0, 0.0]}
"""The state of a `Leveller` that has just begun."""
