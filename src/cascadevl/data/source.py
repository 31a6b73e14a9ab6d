"""What training reads records from, whatever stores them.

Protocols, so that files, Hugging Face data sets and generated tasks are interchangeable and
``data`` need not import ``tasks``. Most sources are read by number. A stream is read in its own
order, in several lanes, so that processes can share the reading.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from cascadevl.types import Record


@runtime_checkable
class Source(Protocol):
    """A sequence of records with random access.

    Access is by number so that the order of training is a pure function of a seed and a run can
    resume anywhere.
    """

    @property
    def name(self) -> str:
        """Name of the data set, by which runs count what they drew and skipped."""

    def __len__(self) -> int:
        """Number of records."""

    def __getitem__(self, index: int, /) -> Record:
        """One record.

        Args:
            index: From 0 to ``len - 1``.

        Raises:
            DataError: If this one record cannot be used.
            IndexError: If there is no such record.
        """


@runtime_checkable
class LaneReader(Protocol):
    """The records of a stream, each lane an endless sequence of its own.

    What is read is a function of lane and ordinal alone. Going back is possible but costs reading
    again from the last place that is remembered, so `mark` and `return_to` carry such places over
    a stop.
    """

    def read(self, lane: int, ordinal: int) -> Record:
        """One record.

        Args:
            lane: From 0 to the number of lanes, exclusive.
            ordinal: Which record of the lane, from 0 upwards without end.

        Raises:
            DataError: If this one record cannot be used.
            TrainingError: If the stream cannot be read on.
        """

    def mark(self, lane: int, ordinal: int) -> dict[str, Any] | None:
        """The nearest remembered place at or before a record, as plain JSON; None for the start.

        Places before it are forgotten.
        """

    def return_to(self, lane: int, place: dict[str, Any] | None) -> None:
        """Remember this one place of a lane, and no other but its start."""


@runtime_checkable
class StreamedSource(Protocol):
    """Records that can only be read one after the other, dealt to lanes."""

    @property
    def name(self) -> str:
        """Name of the data set."""

    @property
    def num_lanes(self) -> int:
        """Number of lanes; each is read on its own."""

    def open(self, key: int) -> LaneReader:
        """A reader in the order of a key; readers share nothing."""

    def head(self, count: int) -> Source:
        """The first records of the stream, by number, for those who only look."""

    def identity(self) -> list[int]:
        """Numbers that must not change when a run is taken up again."""


def readable_by_number(source: Source | StreamedSource, count: int) -> Source:
    """The source itself, or the first records of a stream, for those who only look.

    Args:
        source: The source.
        count: Records wanted of a stream.
    """
    return source if isinstance(source, Source) else source.head(count)
