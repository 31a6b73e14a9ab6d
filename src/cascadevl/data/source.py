"""What training reads records from, whatever stores them.

A Protocol, so that files, Hugging Face data sets and generated tasks are interchangeable and
``data`` need not import ``tasks``.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

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
