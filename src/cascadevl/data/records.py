"""The records of a JSONL file, by number.

Only the places of the lines are kept in memory, so that any number of workers can open the same
file and draw records in any order. A bad line costs nothing until it is drawn, and then it is a
`DataError` with its file and line.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from cascadevl.data.json_text import decode_json
from cascadevl.data.meta import DatasetSpec
from cascadevl.data.parsing import parse_record
from cascadevl.errors import DataError
from cascadevl.types import Record


class JsonlSource:
    """The records of one JSONL file, by number.

    Blank lines, a byte order mark and CRLF line ends are tolerated. With ``repeat_time`` above 1
    a line appears under several numbers, each with an identity of its own (``line#2``), so that
    its repeats are augmented differently.
    """

    def __init__(self, spec: DatasetSpec) -> None:
        """Find the lines, in one pass over the file.

        Args:
            spec: The data set.

        Raises:
            DataError: Of kind ``missing_file`` if the file cannot be read.
        """
        self.name = spec.name
        self._spec = spec
        self._offsets, self._line_numbers = _line_index(spec.annotation)
        self._length = repeated_length(len(self._line_numbers), spec.repeat_time)

    def __len__(self) -> int:
        """Number of records in an epoch, repeats included."""
        return self._length

    @property
    def num_lines(self) -> int:
        """Number of lines with content, whatever ``repeat_time`` says."""
        return len(self._line_numbers)

    def __getitem__(self, index: int, /) -> Record:
        """Read one record.

        Args:
            index: From 0 to ``len - 1``.

        Raises:
            DataError: If the line is not JSON, or not a record.
            IndexError: If there is no such record.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"record {index} of {self._length} in {self._spec.annotation}")
        repeat, place = divmod(index, self.num_lines)
        line = int(self._line_numbers[place])
        source = f"{self._spec.annotation}:{line}"
        with self._spec.annotation.open("rb") as file:
            file.seek(int(self._offsets[place]))
            content = file.readline()
        return parse_record(
            decode_json(content.strip(), source=source),
            source=source,
            root=self._spec.root,
            position=f"{line}#{repeat + 1}" if repeat else f"{line}",
            dataset=self.name,
            max_tiles=self._spec.max_dynamic_patch,
            augment=self._spec.data_augment,
        )


def repeated_length(num_records: int, repeat_time: float) -> int:
    """Number of records an epoch takes from a data set.

    Args:
        num_records: Records stored.
        repeat_time: How often each is used, see `DatasetSpec`.
    """
    # The small addition keeps 0.29 * 100 at 29, which binary fractions put just below.
    return math.floor(num_records * repeat_time + 1e-6)


def _line_index(path: Path) -> tuple[Int64[np.ndarray, " lines"], Int64[np.ndarray, " lines"]]:
    """Byte offset and number of every line that is not blank."""
    offsets, numbers, offset = array("q"), array("q"), 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    offsets.append(offset)
                    numbers.append(number)
                offset += len(line)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the file cannot be read ({error})",
            kind="missing_file",
            source=str(path),
            remedy="check the path",
        ) from error
    return np.array(offsets, dtype=np.int64), np.array(numbers, dtype=np.int64)


def read_records(spec: DatasetSpec) -> Iterator[Record | DataError]:
    """All records of a data set in their order; a bad one comes as its error.

    Args:
        spec: The data set.

    Raises:
        DataError: If the file itself cannot be read.
    """
    source = JsonlSource(spec)
    for index in range(len(source)):
        try:
            yield source[index]
        except DataError as error:
            yield error
