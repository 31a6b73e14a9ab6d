"""A `datasets` data set that is too large to read by number: streamed, shuffled, exactly resumable.

Its parts (files, or row groups of Parquet files) are dealt to a fixed number of lanes. A lane
reads its parts one after the other, in an order drawn anew every epoch, and shuffles each buffer
of neighbouring rows. So the n-th record of a lane is a function of key, lane and n alone: a run
may stop and go on, on any number of processes. The shuffle buffer of `datasets` would not do,
because it is lost when a run stops.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cascadevl.data.parsing import parse_record
from cascadevl.data.permutation import mix, named_key, permuted
from cascadevl.data.source import Source
from cascadevl.errors import ConfigError, TrainingError
from cascadevl.types import Record

if TYPE_CHECKING:
    import datasets

MOST_LANES = 8
"""Lanes of a stream that does not say: a machine's usual number of GPUs."""

LOOKED_INTO = 8
"""Parts whose first rows are shown to those who only look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the reading of a lane stands.

    Attributes:
        ordinal: Records of the lane before it.
        epoch: How often all of the lane was read before.
        part: Number of the part in this epoch's order.
        row: Rows of the part before it.
        state: What `datasets` says of its place in that part; None at its start.
    """

    ordinal: int = 0
    epoch: int = 0
    part: int = 0
    row: int = 0
    state: dict[str, Any] | None = None


class _Row(NamedTuple):
    """A row and where it came from."""

    fields: dict[str, Any]
    part: int
    number: int
    epoch: int


class RowStream:
    """A `datasets.IterableDataset` as a source of records.

    Rows hold what JSONL files hold, under the same names. Pictures stay undecoded where the data
    set knows its columns' types.

    Attributes:
        name: Name of the data set.
        num_lanes: Lanes.
        buffer_rows: Rows of a lane that are shuffled together and held in memory.
        num_parts: Parts the data set divides into.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        *,
        name: str,
        num_lanes: int | None = None,
        buffer_rows: int = 256,
        root: Path | None = None,
        max_tiles: int | None = None,
        augment: bool = False,
    ) -> None:
        """Divide the data set; nothing is read yet.

        Args:
            rows: The rows.
            name: Name of the data set, used in errors and counts.
            num_lanes: Lanes; None for one a part, 8 at most.
            buffer_rows: Rows of a lane that are shuffled together.
            root: Folder that relative image and video paths start from.
            max_tiles: The data set's own limit of tiles a picture.
            augment: Whether pictures are degraded in training.

        Raises:
            ConfigError: If there are more lanes than parts.
        """
        if num_lanes is not None and num_lanes > rows.num_shards:
            rows = rows.reshard()  # a Parquet file divides into its row groups
        self.name, self.buffer_rows, self.num_parts = name, buffer_rows, rows.num_shards
        self.num_lanes = num_lanes or min(self.num_parts, MOST_LANES)
        if self.num_lanes > self.num_parts:
            raise ConfigError(
                f"stream {name!r} shall have {num_lanes} lanes, but its data set divides into "
                f"{self.num_parts} parts; give fewer lanes, or write it in more files"
            )
        self._rows = rows if rows.features is None else rows.decode(False)
        self._root, self._max_tiles, self._augment = root, max_tiles, augment

    def open(self, key: int) -> RowReader:
        """A reader in the order of a key."""
        return RowReader(self, key)

    def head(self, count: int) -> Source:
        """The first records of some parts, by number, for those who only look."""
        return _Head(self, count)

    def identity(self) -> list[int]:
        """Lanes, buffer and parts: what the order depends on."""
        return [self.num_lanes, self.buffer_rows, self.num_parts]

    def part(self, number: int) -> datasets.IterableDataset:
        """One part, to be read on its own."""
        return self._rows.shard(num_shards=self.num_parts, index=number)

    def record(self, row: _Row) -> Record:
        """The record of a row; its identity differs from epoch to epoch.

        Raises:
            DataError: If the row is no record.
        """
        place = f"{row.part}:{row.number}"
        return parse_record(
            row.fields,
            source=f"{self.name}:{place}",
            root=self._root,
            position=f"{place}#{row.epoch + 1}" if row.epoch else place,
            dataset=self.name,
            max_tiles=self._max_tiles,
            augment=self._augment,
        )

    def unreadable(self, where: str, error: Exception) -> TrainingError:
        """The error for a stream that broke off."""
        return TrainingError(
            f"stream {self.name!r} cannot be read {where}: {error}; check the files or the "
            "network and resume the run"
        )


class RowReader:
    """Reads the lanes of a stream, see `cascadevl.data.source.LaneReader`."""

    def __init__(self, stream: RowStream, key: int) -> None:
        """Read nothing yet.

        Args:
            stream: The stream.
            key: Which order.
        """
        self._lanes = [_Lane(stream, number, key) for number in range(stream.num_lanes)]
        self._stream = stream

    def read(self, lane: int, ordinal: int) -> Record:
        """One record of a lane.

        Raises:
            DataError: If the row is no record.
            TrainingError: If the stream cannot be read on, or the lane has no row.
        """
        return self._stream.record(self._lanes[lane].row(ordinal))

    def mark(self, lane: int, ordinal: int) -> dict[str, Any] | None:
        """The nearest beginning of a buffer at or before a record; earlier ones are forgotten."""
        place = self._lanes[lane].mark(ordinal)
        return asdict(place) if place.ordinal else None

    def return_to(self, lane: int, place: dict[str, Any] | None) -> None:
        """Forget the lane but for its start and this place."""
        self._lanes[lane].return_to(None if place is None else Place(**place))


class _Lane:
    """One lane: the buffer it holds, where it reads on, and where earlier buffers began."""

    def __init__(self, stream: RowStream, number: int, key: int) -> None:
        self._stream, self._number = stream, number
        self._parts_key = named_key(key, f"parts {number}")
        self._buffer_key = named_key(key, f"buffer {number}")
        self._places = [Place()]
        self._begin(self._places[0])

    def row(self, ordinal: int) -> _Row:
        if ordinal < self._first:  # an earlier buffer: begin again at the nearest known place
            self._begin(self._nearest(ordinal))
        while ordinal >= self._first + len(self._buffer):
            self._fill()
        return self._buffer[ordinal - self._first]

    def mark(self, ordinal: int) -> Place:
        place = self._nearest(ordinal)
        self._places = [known for known in self._places if not 0 < known.ordinal < place.ordinal]
        return place

    def return_to(self, place: Place | None) -> None:
        self._places = [Place()] if place is None else [Place(), place]
        self._begin(self._places[-1])

    def _nearest(self, ordinal: int) -> Place:
        number: int = bisect_right(self._places, ordinal, key=lambda place: place.ordinal)
        return self._places[number - 1]

    def _begin(self, place: Place) -> None:
        self._place = place
        self._first, self._buffer = place.ordinal, list[_Row]()
        self._part: datasets.IterableDataset | None = None
        self._iterator: Iterator[dict[str, Any]] = iter(())

    def _fill(self) -> None:
        """Read the next buffer; it holds rows of one epoch."""
        start = self._place
        if start.ordinal > self._places[-1].ordinal:
            self._places.append(start)
        rows: list[_Row] = []
        while len(rows) < self._stream.buffer_rows:
            parts = self._order(self._place.epoch)
            if self._place.part < len(parts):
                self._read(parts[self._place.part], rows)
            elif rows:
                break
            else:
                self._next_epoch()
        key = mix(self._buffer_key + start.ordinal)
        self._first = start.ordinal
        self._buffer = [rows[permuted(index, len(rows), key)] for index in range(len(rows))]

    def _read(self, number: int, rows: list[_Row]) -> None:
        """Read on in a part until the buffer is full or the part ends."""
        place, wanted = self._place, self._stream.buffer_rows - len(rows)
        try:
            if self._part is None:
                self._part = self._stream.part(number)
                if place.state is not None:
                    self._part.load_state_dict(place.state)
                self._iterator = iter(self._part)
            found = list(islice(self._iterator, wanted))
        except _errors() as error:
            where = f"on, in part {number} after row {place.row}"
            raise self._stream.unreadable(where, error) from error
        for row, fields in enumerate(found, start=place.row):
            rows.append(_Row(fields, number, row, place.epoch))
        ordinal = place.ordinal + len(found)
        if len(found) < wanted:
            self._place = Place(ordinal=ordinal, epoch=place.epoch, part=place.part + 1)
            self._part = None
        else:
            state = self._part.state_dict()
            row = place.row + len(found)
            self._place = replace(place, ordinal=ordinal, row=row, state=state)

    def _order(self, epoch: int) -> list[int]:
        """The lane's parts in the order of an epoch."""
        own = range(self._number, self._stream.num_parts, self._stream.num_lanes)
        key = mix(self._parts_key + epoch)
        return [own[permuted(index, len(own), key)] for index in range(len(own))]

    def _next_epoch(self) -> None:
        if self._place.ordinal == 0:
            raise TrainingError(
                f"lane {self._number} of stream {self._stream.name!r} has no row; give fewer "
                "lanes, or leave the data set out"
            )
        self._place = Place(ordinal=self._place.ordinal, epoch=self._place.epoch + 1)


class _Head:
    """The first rows of a few parts, read once."""

    def __init__(self, stream: RowStream, count: int) -> None:
        self._stream = stream
        self.name = stream.name
        num_parts = min(stream.num_parts, LOOKED_INTO)
        parts = [index * stream.num_parts // num_parts for index in range(num_parts)]
        try:
            found = [list(stream.part(part).take(-(-count // num_parts))) for part in parts]
        except _errors() as error:
            raise stream.unreadable("at its beginning", error) from error
        rows = (
            [_Row(fields, part, number, 0) for number, fields in enumerate(every)]
            for part, every in zip(parts, found, strict=True)
        )
        self._rows = [row for level in zip_longest(*rows) for row in level if row is not None]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Record:
        if not 0 <= index < len(self._rows):
            raise IndexError(f"record {index} of {len(self._rows)} of {self.name!r}")
        return self._stream.record(self._rows[index])


def _errors() -> tuple[type[Exception], ...]:
    """What reading raises where a file is broken or the network gone."""
    import datasets

    return (OSError, ValueError, datasets.exceptions.DatasetsError)
