"""Tasks by name: as entries of a meta file, ``"annotation": "task:shapes"``, and in settings.

``data`` reads the entry and knows no task; here it becomes a source, or a row of a suite.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection
from dataclasses import replace
from typing import Any, TypeVar, get_args

from cascadevl.data.hub import open_source
from cascadevl.data.meta import DatasetSpec, TaskSpec
from cascadevl.data.mixture import WeightedSource
from cascadevl.data.source import Source, StreamedSource
from cascadevl.errors import ConfigError
from cascadevl.tasks import TASKS
from cascadevl.tasks.base import Split, Stage, Style, Task, TaskSource

T = TypeVar("T")


def open_entry(spec: DatasetSpec) -> Source | StreamedSource:
    """The records of an entry, drawn by a task or read from where they are stored.

    Args:
        spec: The entry.

    Raises:
        DataError: If its file cannot be read.
        ConfigError: If it names a task that does not exist, or sets it up wrongly.
    """
    if spec.task is None:
        return open_source(spec)
    assert spec.length is not None, "reading the meta file has checked it"
    return TaskSource(
        task=task_of(spec),
        split=_one_of(spec.task.split, get_args(Split), spec, "split"),
        length=spec.length,
        seed=spec.task.seed,
        stage=_one_of(spec.task.stage, get_args(Stage), spec, "stage"),
        style=_one_of(spec.task.style, get_args(Style), spec, "style"),
        label=spec.name,
        max_tiles=spec.max_dynamic_patch,
        augment=spec.data_augment,
    )


def weighted(spec: DatasetSpec) -> WeightedSource:
    """An entry as part of a mixture, drawn as often as it has records.

    Files have their repeats among their records; of tasks and streams ``repeat_time`` is a factor.

    Raises:
        DataError: If its file cannot be read.
        ConfigError: If it names a task that does not exist, or sets it up wrongly.
    """
    source = open_entry(spec)
    if spec.task is None and spec.stream is None:
        return WeightedSource(source=source, modality=spec.modality)
    return WeightedSource(
        source=source,
        weight=float(spec.length or 0),
        repeat=spec.repeat_time,
        modality=spec.modality,
    )


def held_out(spec: DatasetSpec) -> DatasetSpec:
    """The entry of a task with its test part instead of its training part.

    Raises:
        ConfigError: If it is no task, or the test part is what the entry names.
    """
    if spec.task is None:
        raise ConfigError(
            f"data set {spec.name!r} is no task, so it has no part that is held out; name a meta "
            f"file that has one under the same name"
        )
    if spec.task.split == "test":
        raise ConfigError(f"data set {spec.name!r} is the test part of its task: nothing is left")
    return replace(spec, task=replace(spec.task, split="test"))


def task_of(spec: DatasetSpec) -> Task:
    """The task that an entry names, set up as it says.

    Raises:
        ConfigError: If there is no such task or setting, or a setting has a wrong value.
    """
    assert isinstance(spec.task, TaskSpec)
    make = TASKS[_one_of(spec.task.name, TASKS, spec, "annotation")]
    known = list(inspect.signature(make).parameters)
    settings: dict[str, Any] = {}
    for key, value in spec.task.settings.items():
        _one_of(key, known, spec, "settings")
        settings[key] = tuple(value) if isinstance(value, list) else value
    try:
        return make(**settings)
    except (TypeError, ValueError) as error:  # a ConfigError is a ValueError
        raise ConfigError(f"data set {spec.name!r}: task.settings: {error}") from error


def task_named(text: str, *, px: int | None = None) -> Task:
    """The task that a word names: ``handwriting``, or ``handwriting:add`` for a difficulty.

    Args:
        text: The word; ``charts:easy@224`` also says the side of the pictures.
        px: Side of the pictures where the word does not say it; None for the task's own.

    Raises:
        ConfigError: If there is no such task or difficulty, or the side is no number.
    """
    text, at, side = text.partition("@")
    name, _, difficulty = text.partition(":")
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}; choose from {', '.join(sorted(TASKS))}")
    if at and not side.isdecimal():
        raise ConfigError(f"the side of the pictures of {name!r} is {side!r}; write {name}@224")
    px = int(side) if at else px
    settings: dict[str, Any] = {} if px is None else {"px": px}
    if difficulty:
        settings["difficulty"] = difficulty
    try:
        return TASKS[name](**settings)
    except TypeError as error:
        raise ConfigError(f"the task {name!r} has no difficulties; name it alone") from error


def _one_of(value: str, known: Collection[T], spec: DatasetSpec, field: str) -> T:
    for option in known:
        if value == option:
            return option
    names = [str(option) for option in known]
    nearest = difflib.get_close_matches(value, names, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"data set {spec.name!r}: {field}: there is no {value!r}; did you mean {nearest!r}? Known "
        f"are {', '.join(names)}"
    )
