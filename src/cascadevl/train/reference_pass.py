"""A pass over all records before training: what a model thinks of each, once, kept on disk.

The model that training starts from is the reference of MPO and of ViCO. What it thinks of every
record is computed before the first step and stored in the run folder, so that there never is a
second copy of the weights. The records are divided into parts of a fixed number, one file each,
written whole or not at all: an interrupted pass goes on with the parts that are missing, on any
number of processes.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import safetensors.torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from cascadevl.data.mixture import WeightedSource
from cascadevl.data.packing import size_of
from cascadevl.data.source import Source
from cascadevl.data.stream import Builder
from cascadevl.errors import ConfigError, DataError, TrainingError
from cascadevl.model.adapters import fingerprint
from cascadevl.model.sharding import wait_for_others
from cascadevl.train.config import FREE_KEYS, TrainConfig, plain
from cascadevl.train.log import counted
from cascadevl.train.sources import row_rule
from cascadevl.types import Example, Record

FOLDER = "reference"
"""Folder of what the reference thinks within a run folder."""

FACTS = "facts.json"
"""File of that folder with what it depends on."""


@dataclass(frozen=True, slots=True)
class _Records:
    """The records of all sources, by one number, in parts."""

    sources: Sequence[Source]
    part_size: int

    @property
    def ends(self) -> list[int]:
        return list(accumulate(len(source) for source in self.sources))

    @property
    def num_parts(self) -> int:
        return -(-self.ends[-1] // self.part_size)

    def part(self, number: int) -> Iterator[Record]:
        """The records of a part; what cannot be read is left out, as training leaves it out."""
        ends = self.ends
        first = number * self.part_size
        for index in range(first, min(first + self.part_size, ends[-1])):
            place = bisect_right(ends, index)
            source = self.sources[place]
            try:
                yield source[index - (ends[place] - len(source))]
            except DataError:
                continue  # training meets it too, and counts it


def stored_parts(
    model: nn.Module,
    sources: Sequence[WeightedSource],
    compute: Callable[[Iterator[Record]], dict[str, Tensor]],
    config: TrainConfig,
    accelerator: Accelerator,
    *,
    part_size: int,
    remedy: str,
    more: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Compute and store what is not there yet, part by part.

    Args:
        model: The model in its state before training; nothing may be dropped at random.
        sources: The records.
        compute: From the records of a part to what is kept of them.
        config: The run's.
        accelerator: Device and processes, which share the parts.
        part_size: Records of a part.
        remedy: What to do where records are streamed.
        more: What the numbers depend on beside model, data and batches, as JSON values.
        console: Where progress is shown; standard error if None.

    Returns:
        The files of all parts, in order.

    Raises:
        ConfigError: If a source is a stream, which has no end.
        TrainingError: If the folder holds what another model or other settings gave.
    """
    numbered = [one.source for one in sources if isinstance(one.source, Source)]
    if len(numbered) < len(sources):
        streamed = next(one.source.name for one in sources if not isinstance(one.source, Source))
        raise ConfigError(
            f"data set {streamed!r} is streamed, so what the reference thinks of it cannot be "
            f"computed before training; write it to files, or {remedy}"
        )
    folder = config.run.out / FOLDER
    records = _Records(numbered, part_size)
    facts = {**_facts(model, numbered, config, part_size), **(more or {})}
    _claim(folder, facts, accelerator)
    files = [folder / f"part-{number:06d}.safetensors" for number in range(records.num_parts)]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    accelerator.wait_for_everyone()  # all have looked before anyone writes
    own = missing[accelerator.process_index :: accelerator.num_processes]
    model.eval()
    title, is_main = "reference log-probabilities", accelerator.is_main_process
    for number in counted(own, title, console, is_main=is_main):
        _publish(files[number], safetensors.torch.save(compute(records.part(number))))
    wait_for_others(model)
    accelerator.wait_for_everyone()
    return files


def rows_of(
    records: Iterator[Record], build: Builder, tokens_per_tile: int, config: TrainConfig
) -> Iterator[list[list[Example]]]:
    """The rows of each batch of some records, by the rule of a run.

    What cannot be used, or is larger than a row, is left out: training meets it too, and counts it.

    Args:
        records: The records.
        build: Makes their examples.
        tokens_per_tile: Visual tokens of a full tile.
        config: The run's.
    """
    rule, ready = row_rule(config.batch), []
    for number, example in enumerate(_examples(records, build)):
        try:
            ready += rule.add(example, size_of(example, tokens_per_tile), number)
        except DataError:
            continue
        while len(ready) >= config.batch.rows:
            yield [row.items for row in ready[: config.batch.rows]]
            ready = ready[config.batch.rows :]
    ready += rule.flush()
    for first in range(0, len(ready), config.batch.rows):
        yield [row.items for row in ready[first : first + config.batch.rows]]


def _examples(records: Iterator[Record], build: Builder) -> Iterator[Example]:
    for record in records:
        try:
            yield build(record)
        except DataError:
            continue


def _facts(
    model: nn.Module, sources: Sequence[Source], config: TrainConfig, part_size: int
) -> dict[str, Any]:
    """What the numbers depend on, as plain JSON values."""
    settings = plain(config)
    free = {key.removeprefix("data.") for key in FREE_KEYS if key.startswith("data.")}
    return {
        "model": fingerprint(model),
        "precision": config.model.precision,
        "seed": config.run.seed,
        "data": {key: value for key, value in settings["data"].items() if key not in free},
        "batch": asdict(config.batch),
        "sources": [[source.name, len(source)] for source in sources],
        "part_size": part_size,
    }


def _claim(folder: Path, facts: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Write the facts down, or compare them with those of an earlier attempt."""
    file = folder / FACTS
    if accelerator.is_main_process and not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _publish(file, json.dumps(facts, indent=2).encode())
    accelerator.wait_for_everyone()
    before = json.loads(file.read_text(encoding="utf-8"))
    if changed := sorted(key for key in facts if before.get(key) != facts[key]):
        raise TrainingError(
            f"{folder} holds reference log-probabilities of another run: {', '.join(changed)} "
            "changed; restore them, delete the folder, or choose another --run.out"
        )


def _publish(file: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    partial.replace(file)
