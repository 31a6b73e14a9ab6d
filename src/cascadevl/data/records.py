"""Data sets in the released layout: a meta file that lists them, and JSONL files of records.

Only the places of the lines are kept in memory, so that any number of workers can open the same
file and draw records in any order. A bad line costs nothing until it is drawn, and then it is a
`DataError` with its file and line.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from cascadevl.data.image import reject_url
from cascadevl.data.json_text import decode_json
from cascadevl.data.parsing import parse_record
from cascadevl.errors import DataError
from cascadevl.types import Record

_META_KEYS = ("root", "annotation", "data_augment", "max_dynamic_patch", "repeat_time", "length")

_META_REMEDY = 'write {"name": {"root": "images/", "annotation": "file.jsonl"}}'


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """One entry of a meta file, its paths resolved.

    Attributes:
        name: Name of the data set.
        annotation: The file of records.
        root: Folder that the records' image and video paths start from.
        data_augment: Whether pictures are degraded by random JPEG compression in training.
        max_dynamic_patch: The data set's own limit of tiles a picture, or None.
        repeat_time: How often each line is used in an epoch. Below 1 only that first fraction of
            the lines is used; 2.5 means all lines twice and the first half of them once more.
        length: Number of lines as the meta file claims it. Informational, never relied on.
    """

    name: str
    annotation: Path
    root: Path
    data_augment: bool = False
    max_dynamic_patch: int | None = None
    repeat_time: float = 1.0
    length: int | None = None


def read_meta(path: Path) -> list[DatasetSpec]:
    """Read a meta file.

    A relative ``annotation`` or ``root`` is taken from the meta file's own folder if it exists
    there, otherwise from the working folder, as the released code does.

    Args:
        path: The meta file.

    Raises:
        DataError: Of kind ``missing_file``, ``invalid_json``, ``bad_meta`` or
            ``unsupported_source``.
    """
    try:
        entries = decode_json(_read(path), source=str(path))
    except DataError as error:
        if path.suffix != ".jsonl":
            raise
        raise _bad_meta(
            "this is a file of records, not a meta file", path, None, _META_REMEDY
        ) from error
    if not isinstance(entries, dict) or not entries:
        raise _bad_meta("the meta file holds no data set", path, None, _META_REMEDY)
    return [_spec(name, entry, path) for name, entry in entries.items()]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(
            f"the file cannot be read ({reason})",
            kind="missing_file",
            source=str(path),
            remedy="check the path",
        ) from error


def _spec(name: str, entry: object, meta: Path) -> DatasetSpec:
    if not isinstance(entry, Mapping):
        raise _bad_meta("the entry is not an object", meta, name, _META_REMEDY)
    for key in entry:
        if key not in _META_KEYS:
            nearest = difflib.get_close_matches(key, _META_KEYS, n=1, cutoff=0.0)[0]
            known = ", ".join(_META_KEYS)
            raise _bad_meta(
                f"unknown key {key!r}",
                meta,
                f"{name}.{key}",
                f"did you mean {nearest!r}? Known are {known}",
            )
    length = entry.get("length")
    return DatasetSpec(
        name=name,
        annotation=_annotation(entry.get("annotation"), meta, name),
        root=_root(entry.get("root", ""), meta, name),
        data_augment=_flag(entry.get("data_augment", False), meta, f"{name}.data_augment"),
        max_dynamic_patch=_limit(entry.get("max_dynamic_patch"), meta, name),
        repeat_time=_repeats(entry.get("repeat_time", 1), meta, name),
        length=length if isinstance(length, int) else None,
    )


def _annotation(value: object, meta: Path, name: str) -> Path:
    field = f"{name}.annotation"
    written = _meta_path(value, meta, field)
    tried = [meta.parent / written, Path(written)]
    for path in tried:
        if _exists(path):
            return path
    raise DataError(
        f"the annotation {written!r} does not exist, neither as {str(tried[0])!r} nor in the "
        f"working folder {str(Path.cwd())!r}",
        kind="missing_file",
        source=str(meta),
        field=field,
        remedy="give the path relative to the meta file, or in full",
    )


def _root(value: object, meta: Path, name: str) -> Path:
    if value in ("", None):
        return meta.parent
    written = _meta_path(value, meta, f"{name}.root")
    beside = meta.parent / written
    # A root that is nowhere is no error yet: sets of text often name one that is not there.
    return Path(written) if not _exists(beside) and _exists(Path(written)) else beside


def _meta_path(value: object, meta: Path, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise _bad_meta(f"is {reprlib.repr(value)}", meta, field, "give a path")
    reject_url(value, source=str(meta), field=field)
    return value


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or one no file can have
        return False


def _flag(value: object, meta: Path, field: str) -> bool:
    if not isinstance(value, bool):
        raise _bad_meta(f"is {reprlib.repr(value)}", meta, field, "write true or false")
    return value


def _limit(value: object, meta: Path, name: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        remedy = "give the most tiles of a picture, a whole number from 1 upwards"
        raise _bad_meta(f"is {reprlib.repr(value)}", meta, f"{name}.max_dynamic_patch", remedy)
    return value


def _repeats(value: object, meta: Path, name: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1e6:  # type: ignore[operator]
        remedy = "give a number above 0: below 1 a first fraction of the lines, above 1 repeats"
        raise _bad_meta(f"is {reprlib.repr(value)}", meta, f"{name}.repeat_time", remedy)
    return float(value)  # type: ignore[arg-type]


def _bad_meta(problem: str, meta: Path, field: str | None, remedy: str) -> DataError:
    return DataError(problem, kind="bad_meta", source=str(meta), field=field, remedy=remedy)


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
