"""JSONL files that grow together, chunk by chunk, and survive an interruption at any point.

Making data with a model takes hours, so it must be possible to go on. A chunk is written to all
files first and then noted in a journal with the files' sizes: what a crash left behind the last
noted size is cut off when the work is taken up again, so that no record is lost or doubled.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cascadevl.data.json_text import decode_json
from cascadevl.errors import ConfigError

JOURNAL = "journal.jsonl"
"""Name of the journal in a folder that holds nothing else."""


class Journal:
    """Files of records that are written in numbered chunks.

    Attributes:
        num_chunks: Chunks that are complete on disk.
        state: What was noted with the last one; empty before the first.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        settings: Mapping[str, Any],
        *,
        resume: bool,
        journal: str = JOURNAL,
    ) -> None:
        """Open a folder for a new set of files, or go on with one.

        Args:
            folder: Made if missing.
            names: Names of the files.
            settings: JSON values that the content depends on; a resumed set must have the same.
            resume: Go on where an earlier attempt stopped; a folder without one is begun.
            journal: Name of the journal in the folder.

        Raises:
            ConfigError: If there are files already and they are not to be gone on with, they were
                made with other settings, or they were changed since.
            DataError: Of kind ``invalid_json``, if the journal was damaged.
        """
        self._folder, self._names = folder, tuple(names)
        self._path = folder / journal
        self.num_chunks, self.state = 0, dict[str, Any]()
        plain = _plain(settings)
        if not self._path.exists():
            self._begin(plain)
            return
        if not resume:
            raise ConfigError(
                f"{folder} holds data already; go on with them (resume), or choose another folder"
            )
        self._take_up(plain)

    def commit(
        self, records: Mapping[str, Sequence[Mapping[str, Any]]], state: Mapping[str, Any]
    ) -> None:
        """Append one chunk to the files, and note that it is complete.

        Args:
            records: The chunk's records by file; a file may have none.
            state: JSON values that the next chunks go on from.
        """
        for name, chunk in records.items():
            with self._file(name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in chunk)
        self.num_chunks += 1
        self.state = dict(state)
        entry = {"chunk": self.num_chunks, "sizes": self._sizes(), "state": self.state}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _file(self, name: str) -> Path:
        return self._folder / name

    def _sizes(self) -> dict[str, int]:
        return {name: self._file(name).stat().st_size for name in self._names}

    def _begin(self, settings: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in self._names:
            # An empty file may be what an attempt left that was ended right here.
            if self._file(name).exists() and self._file(name).stat().st_size > 0:
                raise ConfigError(
                    f"{self._file(name)} is there, but no {self._path.name}; choose another folder"
                )
        for name in self._names:
            self._file(name).touch()
        # Renamed into place: half a first line would leave files that nothing can go on with.
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({"settings": settings}) + "\n", "utf-8")
        partial.replace(self._path)

    def _take_up(self, settings: Mapping[str, Any]) -> None:
        entries, whole_size = _entries(self._path)
        _check_same(entries[0]["settings"], settings, self._folder)
        sizes = dict.fromkeys(self._names, 0)
        if len(entries) > 1:
            last = entries[-1]
            self.num_chunks, self.state, sizes = last["chunk"], last["state"], last["sizes"]
        paths = {self._file(name): size for name, size in sizes.items()}
        for path, size in {**paths, self._path: whole_size}.items():
            _cut(path, size)


def noted_sizes(journal: Path) -> dict[str, int]:
    """Up to where files are complete, whoever is writing them meanwhile.

    Args:
        journal: Their journal.

    Returns:
        Bytes by name; empty before the first chunk.

    Raises:
        DataError: Of kind ``invalid_json``, if the journal was damaged.
    """
    entries, _ = _entries(journal)
    return dict(entries[-1]["sizes"]) if len(entries) > 1 else {}


def check_settings(journal: Path, settings: Mapping[str, Any]) -> None:
    """Make sure that files were begun with some settings.

    Args:
        journal: Their journal.
        settings: JSON values.

    Raises:
        ConfigError: If they were begun with others.
        DataError: Of kind ``invalid_json``, if the journal was damaged.
    """
    entries, _ = _entries(journal)
    _check_same(entries[0]["settings"], _plain(settings), journal.parent)


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Make sure that nobody else appends to a file meanwhile.

    Args:
        file: The file; its folder is made if missing.

    Raises:
        ConfigError: If another process is writing it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    path = file.with_name(f"{file.name}.lock")
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_gone = os.fstat(lock.fileno()).st_nlink == 0  # whoever had it has just ended
        except BlockingIOError:
            is_gone = True
        if is_gone:
            raise ConfigError(f"{file} is being written by another process; wait until it ends")
        try:
            yield
        finally:
            path.unlink()


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return values


def _entries(journal: Path) -> tuple[list[Any], int]:
    """What a journal notes, and the size of that; the rest is a line that was not finished."""
    content = journal.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines = enumerate(whole.splitlines(), start=1)
    return [decode_json(line, source=f"{journal}:{number}") for number, line in lines], len(whole)


def _cut(path: Path, size: int) -> None:
    """Take away what was written after the last note."""
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        raise ConfigError(
            f"{path} has {found} bytes, but {size} were noted: it was changed or lost since; "
            "choose another folder"
        )
    with path.open("r+b") as file:
        file.truncate(size)


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{folder} was begun with {key} = {before.get(key)!r} and cannot go on with "
            f"{now.get(key)!r}; give the same settings, or choose another folder"
        )
