"""Which samples share a row: best fit by tokens and tiles, and the plain fixed grouping.

InternVL2.5 report, section on data packing (select, search, pack, maintain), which InternVL3 and
3.5 keep: a sample joins an open row in which it fits under both limits; when too many rows are
open, one leaves. The public code searches by tiles alone and lets the row with most tiles leave;
here both limits decide and the fullest row leaves, which fills rows better (measured in the tests).

A packer holds samples back, so it is part of a run's state. The state names each sample by its
position in the mixture, and the stream builds the samples again: nothing is pickled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from cascadevl.data.collate import num_tokens
from cascadevl.errors import ConfigError, DataError
from cascadevl.types import Example

T = TypeVar("T")


class Size(NamedTuple):
    """What a sample takes of a row."""

    tokens: int
    tiles: int


def size_of(example: Example, tokens_per_tile: int) -> Size:
    """Tokens of an example once its images are expanded, and its tiles."""
    return Size(num_tokens(example, tokens_per_tile), example.num_tiles)


@dataclass(slots=True)
class Row(Generic[T]):
    """Samples that go through the model side by side.

    Attributes:
        items: The samples, in the order they came.
        positions: Position of each sample in the mixture.
        tokens: Tokens of all samples.
        tiles: Tiles of all samples.
    """

    items: list[T] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    tokens: int = 0
    tiles: int = 0

    def add(self, item: T, size: Size, position: int) -> None:
        """Append a sample."""
        self.items.append(item)
        self.positions.append(position)
        self.tokens += size.tokens
        self.tiles += size.tiles


@dataclass(slots=True)
class Fill:
    """How full the rows were that have left.

    Attributes:
        rows: Number of rows.
        tokens: Their tokens.
        tiles: Their tiles.
    """

    rows: int = 0
    tokens: int = 0
    tiles: int = 0

    def count(self, row: Row[Any]) -> None:
        """Count a row that leaves."""
        self.rows += 1
        self.tokens += row.tokens
        self.tiles += row.tiles


class Packer(Generic[T]):
    """Fills rows up to a number of tokens and of tiles.

    A sample joins the open row that it leaves with the least room, shares of tokens and of tiles
    added up. If it fits nowhere, a row is opened; if that is one too many, the one with most
    tokens leaves first. A row leaves at once when no token more fits.

    Attributes:
        fill: What the rows that left held, to be compared with the limits.
    """

    def __init__(self, max_tokens: int, max_tiles: int, buffer_rows: int = 20) -> None:
        """Start with no open row.

        Args:
            max_tokens: Most tokens of a row (32768 in the InternVL3.5 recipes).
            max_tiles: Most tiles of a row (96 there); bounds the work of the vision half.
            buffer_rows: Rows kept open at most (20 there).

        Raises:
            ConfigError: If a limit is not positive.
        """
        if min(max_tokens, max_tiles, buffer_rows) < 1:
            raise ConfigError(
                f"packing into rows of {max_tokens} tokens and {max_tiles} tiles with "
                f"{buffer_rows} open rows is impossible; all three must be at least 1"
            )
        self.max_tokens, self.max_tiles, self.buffer_rows = max_tokens, max_tiles, buffer_rows
        self.fill = Fill()
        self._open: list[Row[T]] = []

    def add(self, item: T, size: Size, position: int) -> list[Row[T]]:
        """Take a sample in.

        Args:
            item: The sample.
            size: Its tokens and tiles.
            position: Its position in the mixture, by which a resumed run finds it again.

        Returns:
            The rows that leave because of it: none, one or two.

        Raises:
            DataError: If the sample alone is larger than a row.
        """
        if size.tokens > self.max_tokens or size.tiles > self.max_tiles:
            raise DataError(
                f"the sample has {size.tokens} tokens and {size.tiles} tiles, a row holds "
                f"{self.max_tokens} tokens and {self.max_tiles} tiles",
                kind="too_long",
                remedy="raise the row's limits, lower max_tiles of the tiling, or shorten it",
            )
        leaving = []
        row = self._best_row(size)
        if row is None:
            if len(self._open) == self.buffer_rows:
                leaving.append(self._close(max(self._open, key=lambda row: row.tokens)))
            row = Row()
            self._open.append(row)
        row.add(item, size, position)
        if row.tokens == self.max_tokens:
            leaving.append(self._close(row))
        return leaving

    def flush(self) -> list[Row[T]]:
        """All open rows, fullest first; none is open afterwards."""
        rows = sorted(self._open, key=lambda row: row.tokens, reverse=True)
        return [self._close(row) for row in rows]

    def fill_shares(self) -> tuple[float, float]:
        """Mean share of the token and of the tile limit that the rows used; 0 before any left."""
        rows = max(self.fill.rows, 1)
        return (
            self.fill.tokens / (rows * self.max_tokens),
            self.fill.tiles / (rows * self.max_tiles),
        )

    def state_dict(self) -> dict[str, Any]:
        """The open rows by the positions of their samples, and the counts; plain JSON."""
        return {
            "rows": [list(row.positions) for row in self._open],
            "fill": [self.fill.rows, self.fill.tokens, self.fill.tiles],
        }

    def load_state_dict(
        self, state: dict[str, Any], rebuild: Callable[[int], tuple[T, Size]]
    ) -> None:
        """Open the same rows again.

        Args:
            state: What `state_dict` returned.
            rebuild: Makes the sample of a position anew, and tells its size.
        """
        self.fill = Fill(*state["fill"])
        self._open = [rebuild_row(positions, rebuild) for positions in state["rows"]]

    def _best_row(self, size: Size) -> Row[T] | None:
        best, least = None, math.inf
        for row in self._open:
            tokens = self.max_tokens - row.tokens - size.tokens
            tiles = self.max_tiles - row.tiles - size.tiles
            room = tokens / self.max_tokens + tiles / self.max_tiles
            if tokens >= 0 and tiles >= 0 and room < least:
                best, least = row, room
        return best

    def _close(self, row: Row[T]) -> Row[T]:
        self._open = [other for other in self._open if other is not row]
        self.fill.count(row)
        return row


class FixedRows(Generic[T]):
    """Rows of a fixed number of samples each, in the order they come: for small models.

    Attributes:
        fill: What the rows that left held.
    """

    def __init__(self, samples_per_row: int) -> None:
        """Start with an empty row.

        Raises:
            ConfigError: If a row shall hold less than one sample.
        """
        if samples_per_row < 1:
            raise ConfigError(f"samples_per_row is {samples_per_row}; it must be at least 1")
        self.samples_per_row = samples_per_row
        self.fill = Fill()
        self._open: Row[T] = Row()

    def add(self, item: T, size: Size, position: int) -> list[Row[T]]:
        """Take a sample in; returns the row it completes, if it does."""
        self._open.add(item, size, position)
        return self.flush() if len(self._open.items) == self.samples_per_row else []

    def flush(self) -> list[Row[T]]:
        """The open row, if it holds anything."""
        row, self._open = self._open, Row()
        if not row.items:
            return []
        self.fill.count(row)
        return [row]

    def state_dict(self) -> dict[str, Any]:
        """The open row by the positions of its samples, and the counts; plain JSON."""
        return {
            "rows": [list(self._open.positions)],
            "fill": [self.fill.rows, self.fill.tokens, self.fill.tiles],
        }

    def load_state_dict(
        self, state: dict[str, Any], rebuild: Callable[[int], tuple[T, Size]]
    ) -> None:
        """Fill the open row again; arguments as those of `Packer.load_state_dict`."""
        self.fill = Fill(*state["fill"])
        self._open = rebuild_row([p for row in state["rows"] for p in row], rebuild)


def rebuild_row(positions: list[int], rebuild: Callable[[int], tuple[T, Size]]) -> Row[T]:
    """A row made anew from the positions of its samples."""
    row: Row[T] = Row()
    for position in positions:
        item, size = rebuild(position)
        row.add(item, size, position)
    return row
