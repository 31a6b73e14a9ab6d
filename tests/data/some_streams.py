"""Streams of made-up records in rows of every kind, and what they give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from cascadevl.data.mixture import Mixture, WeightedSource
from cascadevl.data.packing import FixedRows, Packer
from cascadevl.data.stream import BatchStream, CollateConfig, StreamConfig
from cascadevl.errors import DataError
from cascadevl.types import NO_PARENT, Batch, Example, Message, Record

IMAGE = 99
COLLATE = CollateConfig(image_token_id=IMAGE, pad_token_id=0, tokens_per_tile=2)


class Numbers:
    """Records 0, 1, ...; those for which ``bad`` holds cannot be read."""

    def __init__(self, name: str, length: int, bad: Callable[[int], bool] = lambda _: False):
        self.name, self.length, self.bad = name, length, bad

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Record:
        if self.bad(index):
            raise DataError(
                "no such file", kind="missing_image", source=f"{self.name}.jsonl:{index}"
            )
        return Record(
            source=f"{self.name}:{index}",
            record_id=str(index),
            messages=(Message.of("user", "hi"),),
        )


def build(record: Record, *, epoch: int = 0) -> Example:
    """An example whose tokens, length and pixels follow from the record and the epoch."""
    number = int(record.record_id)
    rng = np.random.default_rng([number, epoch])
    length = 3 + number % 5
    ids = rng.integers(1, 90, length)
    with_image = number % 3 == 0
    if with_image:
        ids[1] = IMAGE
    return Example(
        source=record.source,
        record_id=record.record_id,
        input_ids=ids,
        trained=np.arange(length) > 1,
        segments=np.zeros(length, dtype=np.int64),
        parents=(NO_PARENT,),
        tiles=rng.integers(0, 255, (int(with_image), 2, 2, 3), dtype=np.uint8),
        tiles_per_image=(1,) * with_image,
        increments=(0.5,) * with_image,
    )


def mixture(*, lengths: tuple[int, int] = (20, 30), seed: int = 0) -> Mixture:
    return Mixture(
        [
            WeightedSource(source=Numbers("a", lengths[0]), weight=1.0),
            WeightedSource(source=Numbers("b", lengths[1]), weight=3.0),
        ],
        seed=seed,
    )


def packed(
    source: Mixture | None = None,
    config: StreamConfig | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> BatchStream:
    return BatchStream(
        source or mixture(),
        build,
        Packer(24, 4, 3),
        COLLATE,
        config or StreamConfig(rows_per_batch=2),
        rank=rank,
        world_size=world_size,
    )


def fixed(
    source: Mixture | None = None,
    config: StreamConfig | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> BatchStream:
    return BatchStream(
        source or mixture(),
        build,
        FixedRows(3),
        COLLATE,
        config or StreamConfig(rows_per_batch=2),
        rank=rank,
        world_size=world_size,
    )


def levelled(
    source: Mixture | None = None,
    config: StreamConfig | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> BatchStream:
    config = dataclasses.replace(config or StreamConfig(rows_per_batch=2), level_rows=3)
    return packed(source, config, rank=rank, world_size=world_size)


Make = Callable[..., BatchStream]


def assert_same(one: Batch, two: Batch) -> None:
    for name in one.__dataclass_fields__:
        left, right = getattr(one, name), getattr(two, name)
        if isinstance(left, torch.Tensor):
            assert torch.equal(left, right), name
        else:
            assert left == right, name


def sources_of(batches: list[Batch]) -> list[str]:
    return [source for batch in batches for source in batch.sources]
