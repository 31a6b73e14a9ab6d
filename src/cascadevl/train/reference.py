"""What the model thought of every pair before it was trained: the reference of MPO, kept on disk.

The reference is the model that training starts from, so its log-probabilities are computed before
the first step and stored in the run folder, two numbers a pair; there never is a second copy of
the weights. The pairs are divided into parts of a fixed number of records, one file each, written
whole or not at all: an interrupted pass goes on with the parts that are missing, on any number of
processes.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from cascadevl.data.mixture import WeightedSource
from cascadevl.data.packing import size_of
from cascadevl.data.pairs import PairBatch, PairBuilder, PairCollate, digest
from cascadevl.data.source import Source
from cascadevl.errors import ConfigError, DataError, TrainingError
from cascadevl.model.adapters import adapters_off, fingerprint
from cascadevl.train.config import FREE_KEYS, TrainConfig, plain
from cascadevl.train.logprobs import answer_logprobs
from cascadevl.train.sources import row_rule
from cascadevl.types import Example, Record

FOLDER = "reference"
"""Folder of the reference log-probabilities within a run folder."""

FACTS = "facts.json"
"""File of that folder with what they depend on."""


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The records of all sources, by one number, in parts."""

    sources: Sequence[Source]
    part_size: int

    @property
    def ends(self) -> list[int]:
        return list(accumulate(len(source) for source in self.sources))

    @property
    def num_parts(self) -> int:
        return -(-self.ends[-1] // self.part_size)

    def records(self, part: int) -> Iterator[Record]:
        """The records of a part; what cannot be read is left out, as training leaves it out."""
        ends = self.ends
        first = part * self.part_size
        for number in range(first, min(first + self.part_size, ends[-1])):
            place = bisect_right(ends, number)
            source = self.sources[place]
            try:
                yield source[number - (ends[place] - len(source))]
            except DataError:
                continue  # training meets it too, and counts it


def stored_reference(
    model: nn.Module,
    sources: Sequence[WeightedSource],
    build: PairBuilder,
    collate: PairCollate,
    config: TrainConfig,
    accelerator: Accelerator,
    *,
    part_size: int,
    console: Console | None = None,
) -> dict[bytes, tuple[float, float]]:
    """Log-probabilities of all pairs under the model as it is now, its adapters off.

    Parts that an earlier attempt has written are read, all others are computed and written.

    Args:
        model: The model in its state before training; nothing may be dropped at random.
        sources: The pairs.
        build: Makes their examples.
        collate: Makes their batches.
        config: The run's.
        accelerator: Device and processes, which share the parts.
        part_size: Records of a part.
        console: Where progress is shown; standard error if None.

    Returns:
        Of the chosen and the rejected answer, by the digest of the pair's example.

    Raises:
        ConfigError: If a source is a stream, which has no end.
        TrainingError: If the folder holds those of another model or of other settings, or a
            log-probability is not finite.
    """
    numbered = [one.source for one in sources if isinstance(one.source, Source)]
    if len(numbered) < len(sources):
        streamed = next(one.source.name for one in sources if not isinstance(one.source, Source))
        raise ConfigError(
            f"data set {streamed!r} is streamed, so what the reference thinks of it cannot be "
            "computed before training; write it to files, or train adapters with --lora "
            "--mpo.reference adapters_off"
        )
    folder = config.run.out / FOLDER
    pairs = _Pairs(numbered, part_size)
    _claim(folder, _facts(model, numbered, config, part_size), accelerator)
    files = [folder / f"part-{number:06d}.safetensors" for number in range(pairs.num_parts)]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    accelerator.wait_for_everyone()  # all have looked before anyone writes
    own = missing[accelerator.process_index :: accelerator.num_processes]
    shown = console or Console(stderr=True)
    model.eval()
    for number in own:
        shown.print(f"reference log-probabilities: part {number + 1} of {pairs.num_parts}")
        examples = _examples(pairs.records(number), build)
        scores = _scores(model, examples, collate, config, accelerator.device)
        _write(files[number], scores)
    accelerator.wait_for_everyone()
    return {key: value for file in files for key, value in _read(file).items()}


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


def _examples(records: Iterator[Record], build: PairBuilder) -> Iterator[Example]:
    for record in records:
        try:
            yield build(record)
        except DataError:
            continue  # training meets it too, and counts it


def _scores(
    model: nn.Module,
    examples: Iterator[Example],
    collate: PairCollate,
    config: TrainConfig,
    device: torch.device,
) -> dict[bytes, tuple[float, float]]:
    """Log-probabilities of the answers of some pairs, packed as training packs them."""
    scores: dict[bytes, tuple[float, float]] = {}
    for rows in _rows(examples, collate.tokens_per_tile, config):
        batch = collate(rows)
        keys = [digest(example) for row in rows for example in row]
        values = _pair_logprobs(model, batch.to(device)).T.tolist()
        for key, (chosen, rejected), source in zip(keys, values, batch.sources, strict=True):
            if not torch.tensor([chosen, rejected]).isfinite().all():
                raise TrainingError(
                    f"{source}: the model gives the chosen answer log-probability {chosen} and the "
                    f"rejected {rejected} before any training; look at the model and this pair"
                )
            scores[key] = (chosen, rejected)
    return scores


def _rows(
    examples: Iterator[Example], tokens_per_tile: int, config: TrainConfig
) -> Iterator[list[list[Example]]]:
    """The rows of each batch."""
    rule, ready = row_rule(config.batch), []
    for number, example in enumerate(examples):
        try:
            ready += rule.add(example, size_of(example, tokens_per_tile), number)
        except DataError:
            continue  # larger than a row; training meets it too, and counts it
        while len(ready) >= config.batch.rows:
            yield [row.items for row in ready[: config.batch.rows]]
            ready = ready[config.batch.rows :]
    ready += rule.flush()
    for first in range(0, len(ready), config.batch.rows):
        yield [row.items for row in ready[first : first + config.batch.rows]]


@torch.no_grad()
def _pair_logprobs(model: nn.Module, batch: PairBatch) -> Tensor:
    """Log-probabilities of chosen and rejected answers under the base model: (2, pairs)."""
    with adapters_off(model):
        samples = answer_logprobs(model, batch.packed)
    return torch.stack([samples[batch.chosen], samples[batch.rejected]])


def _write(file: Path, scores: Mapping[bytes, tuple[float, float]]) -> None:
    keys = torch.tensor([list(key) for key in scores], dtype=torch.uint8).view(-1, 16)
    values = torch.tensor(list(scores.values()), dtype=torch.float32).view(-1, 2)
    _publish(file, safetensors.torch.save({"keys": keys, "logprobs": values}))


def _read(file: Path) -> dict[bytes, tuple[float, float]]:
    tensors = safetensors.torch.load_file(file)
    keys, values = tensors["keys"].tolist(), tensors["logprobs"].tolist()
    return {
        bytes(key): (chosen, rejected) for key, (chosen, rejected) in zip(keys, values, strict=True)
    }


def _publish(file: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    partial.replace(file)
