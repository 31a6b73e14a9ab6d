"""The meta file: which data sets a run is made of, where they are and how they are used.

The released format, with three additions: ``modality``, an annotation ``task:NAME`` for drawn
questions, and ``stream`` for data sets that are read in their own order.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cascadevl.data.image import reject_url
from cascadevl.data.json_text import decode_json
from cascadevl.data.modality import MODALITIES, Modality
from cascadevl.errors import DataError

HUB, TASK = "hub:", "task:"
"""Beginnings of an annotation that is no file: a data set of the Hugging Face Hub, a task."""

_REMEDY = 'write {"name": {"root": "images/", "annotation": "file.jsonl"}}'


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """How a task is set up, as the meta file has it; the tasks themselves check it.

    Attributes:
        name: Name of the task.
        settings: Its own settings, such as ``difficulty``.
        stage: What its records are for.
        style: How answers with worked steps are written.
        split: Which part of the material.
        seed: Seed of the scenes.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    stage: str = "sft"
    style: str = "steps"
    split: str = "train"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpec:
    """How a data set is streamed.

    Attributes:
        lanes: Parts read side by side; a multiple of the number of processes lets them share the
            reading. None for one a file, 8 at most.
        buffer: Neighbouring rows of a lane that are shuffled together and held in memory.
        subset: Configuration of a data set on the Hub.
        split: Its split.
        revision: Its commit or branch; give one, so that a resumed run reads the same rows.
    """

    lanes: int | None = None
    buffer: int = 256
    subset: str | None = None
    split: str = "train"
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """One entry of a meta file, its paths resolved.

    Attributes:
        name: Name of the data set.
        annotation: The file of records; ``hub:NAME`` or ``task:NAME`` where it is no file.
        root: Folder that the records' image and video paths start from.
        data_augment: Whether pictures are degraded by random JPEG compression in training.
        max_dynamic_patch: The data set's own limit of tiles a picture, or None.
        repeat_time: How often each line is used in an epoch. Below 1 only that first fraction of
            the lines is used; 2.5 means all lines twice and the first half of them once more. Of
            tasks and streams, a factor on how often they are drawn.
        length: Number of lines as the meta file claims it: informational for a file, the number
            of scenes of a task, and what a stream counts for when data sets are drawn by size.
        modality: Text or multimodal; None to find out.
        task: How the task is set up, if it is one.
        stream: How it is streamed, if it is.
    """

    name: str
    annotation: Path
    root: Path
    data_augment: bool = False
    max_dynamic_patch: int | None = None
    repeat_time: float = 1.0
    length: int | None = None
    modality: Modality | None = None
    task: TaskSpec | None = None
    stream: StreamSpec | None = None


_KEYS = [each.name for each in fields(DatasetSpec) if each.name != "name"]
_TASK_KEYS = [each.name for each in fields(TaskSpec) if each.name != "name"]
_STREAM_KEYS = [each.name for each in fields(StreamSpec)]


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
            "this is a file of records, not a meta file", path, None, _REMEDY
        ) from error
    if not isinstance(entries, dict) or not entries:
        raise _bad_meta("the meta file holds no data set", path, None, _REMEDY)
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
        raise _bad_meta("the entry is not an object", meta, name, _REMEDY)
    _check_keys(entry, _KEYS, meta, name)
    length = entry.get("length")
    annotation = _annotation(entry.get("annotation"), meta, name)
    spec = DatasetSpec(
        name=name,
        annotation=annotation,
        root=_root(entry.get("root", ""), meta, name),
        data_augment=_flag(entry.get("data_augment", False), meta, f"{name}.data_augment"),
        max_dynamic_patch=_limit(entry.get("max_dynamic_patch"), meta, name),
        repeat_time=_repeats(entry.get("repeat_time", 1), meta, name),
        length=length if isinstance(length, int) and not isinstance(length, bool) else None,
        modality=_modality(entry.get("modality"), meta, name),
        task=_task(entry.get("task"), annotation, meta, name),
        stream=_stream(entry.get("stream"), annotation, meta, name),
    )
    if (spec.task or spec.stream) and (spec.length is None or spec.length < 1):
        what = "scenes of a task" if spec.task else "records of a stream"
        raise _bad_meta(
            f"is {reprlib.repr(length)}, but the number of {what} is known from nowhere else",
            meta,
            f"{name}.length",
            "give a whole number; where data sets are drawn by size, it is the weight",
        )
    return spec


def _check_keys(entry: Mapping[Any, Any], known: Sequence[str], meta: Path, path: str) -> None:
    for key in entry:
        if key not in known:
            nearest = difflib.get_close_matches(f"{key}", known, n=1, cutoff=0.0)[0]
            raise _bad_meta(
                f"unknown key {key!r}",
                meta,
                f"{path}.{key}",
                f"did you mean {nearest!r}? Known are {', '.join(known)}",
            )


def _annotation(value: object, meta: Path, name: str) -> Path:
    field = f"{name}.annotation"
    written = _meta_path(value, meta, field)
    if written.startswith((HUB, TASK)):
        return Path(written)
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
    remedy = "give the most tiles of a picture, a whole number from 1 upwards"
    return _count(value, meta, f"{name}.max_dynamic_patch", remedy)


def _count(value: object, meta: Path, field: str, remedy: str, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _bad_meta(f"is {reprlib.repr(value)}", meta, field, remedy)
    return value


def _repeats(value: object, meta: Path, name: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1e6:  # type: ignore[operator]
        remedy = "give a number above 0: below 1 a first fraction of the lines, above 1 repeats"
        raise _bad_meta(f"is {reprlib.repr(value)}", meta, f"{name}.repeat_time", remedy)
    return float(value)  # type: ignore[arg-type]


def _modality(value: object, meta: Path, name: str) -> Modality | None:
    if value is None:
        return None
    for modality in MODALITIES:
        if value == modality:
            return modality
    remedy = f"write {' or '.join(MODALITIES)}, or leave it out to have it found"
    raise _bad_meta(f"is {reprlib.repr(value)}", meta, f"{name}.modality", remedy)


def _task(value: object, annotation: Path, meta: Path, name: str) -> TaskSpec | None:
    task = str(annotation).removeprefix(TASK)
    if not str(annotation).startswith(TASK):
        if value is not None:
            remedy = f'write "annotation": "{TASK}NAME", or leave "task" out'
            raise _bad_meta("the annotation names no task", meta, f"{name}.task", remedy)
        return None
    given = _section(value, _TASK_KEYS, meta, f"{name}.task")
    texts = {key: _word(given[key], meta, f"{name}.task.{key}") for key in given if key in _WORDS}
    settings = given.get("settings", {})
    if not isinstance(settings, Mapping):
        remedy = 'write an object, such as {"difficulty": "easy"}'
        raise _bad_meta(f"is {reprlib.repr(settings)}", meta, f"{name}.task.settings", remedy)
    seed = _count(given.get("seed", 0), meta, f"{name}.task.seed", "give a whole number", 0)
    return TaskSpec(name=task, settings=dict(settings), seed=seed, **texts)


_WORDS = ("stage", "style", "split")


def _stream(value: object, annotation: Path, meta: Path, name: str) -> StreamSpec | None:
    field = f"{name}.stream"
    if value is None or value is False:
        if str(annotation).startswith(HUB):
            remedy = 'write "stream": true; data sets of the Hub are only streamed'
            raise _bad_meta("is missing", meta, field, remedy)
        return None
    if str(annotation).startswith(TASK) or annotation.suffix == ".jsonl":
        remedy = "leave it out: these records are read by number, at no cost in memory"
        raise _bad_meta("there is nothing to stream", meta, field, remedy)
    given = _section(None if value is True else value, _STREAM_KEYS, meta, field)
    numbers = {
        key: _count(given[key], meta, f"{field}.{key}", "give a whole number from 1 upwards")
        for key in ("lanes", "buffer")
        if key in given
    }
    names = ("subset", "split", "revision")
    words = {key: _word(given[key], meta, f"{field}.{key}") for key in names if key in given}
    return StreamSpec(**numbers, **words)  # type: ignore[arg-type]


def _section(value: object, known: Sequence[str], meta: Path, path: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        remedy = f"write an object with some of {', '.join(known)}"
        raise _bad_meta(f"is {reprlib.repr(value)}", meta, path, remedy)
    _check_keys(value, known, meta, path)
    return value


def _word(value: object, meta: Path, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise _bad_meta(f"is {reprlib.repr(value)}", meta, field, "give a word")
    return value


def _bad_meta(problem: str, meta: Path, field: str | None, remedy: str) -> DataError:
    return DataError(problem, kind="bad_meta", source=str(meta), field=field, remedy=remedy)
