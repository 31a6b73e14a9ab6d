"""Packed batches for tests, made from random prompts by the package's own expansion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tests.model.small import IMAGE, PX, TOKENS_PER_TILE, VOCAB
from torch import Tensor

from cascadevl.data.tiling import normalise
from cascadevl.sequence import expand
from cascadevl.types import NO_PARENT, PADDING_SEGMENT, Batch


@dataclass(frozen=True)
class Sample:
    """A sample alone: ids, positions and tiles as one row would hold them."""

    input_ids: Tensor
    position_ids: Tensor
    tiles: Tensor | None

    @property
    def pixel_values(self) -> Tensor | None:
        """The tiles as a plain call takes them."""
        return None if self.tiles is None else normalise(self.tiles)


def sample(
    tiles: Sequence[int], increments: Sequence[float] | None = None, seed: int = 0
) -> Sample:
    """A random prompt with images of so many tiles."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(8, VOCAB, 4).tolist()
    for _ in tiles:
        ids += [IMAGE, *generator.integers(8, VOCAB, generator.integers(2, 7)).tolist()]
    expanded = expand(
        np.asarray(ids),
        np.zeros(len(ids), dtype=bool),
        np.zeros(len(ids), dtype=np.int64),
        (NO_PARENT,),
        image_token_id=IMAGE,
        tokens_per_image=[TOKENS_PER_TILE * number for number in tiles],
        increments=increments or [1.0] * len(tiles),
    )
    drawn = generator.integers(0, 256, (sum(tiles), PX, PX, 3), dtype=np.uint8)
    return Sample(
        torch.from_numpy(expanded.input_ids),
        torch.from_numpy(expanded.position_ids),
        torch.from_numpy(drawn) if len(drawn) else None,
    )


def pack(rows: Sequence[Sequence[Sample]]) -> Batch:
    """Rows of samples; every token but the first of each sample is a target."""
    width = max(sum(len(each.input_ids) for each in row) for row in rows) + 1
    shape = (len(rows), width)
    input_ids = torch.ones(shape, dtype=torch.int64)
    position_ids = torch.zeros(shape)
    segments = torch.full(shape, PADDING_SEGMENT)
    predictors, targets, weights, samples = [], [], [], []
    number = 0
    for row, members in enumerate(rows):
        start = 0
        for segment, each in enumerate(members):
            stop = start + len(each.input_ids)
            input_ids[row, start:stop] = each.input_ids
            position_ids[row, start:stop] = each.position_ids
            segments[row, start:stop] = segment
            predictors += range(row * width + start, row * width + stop - 1)
            targets += each.input_ids[1:].tolist()
            weights += [1.0 / len(each.input_ids)] * (stop - start - 1)
            samples += [number] * (stop - start - 1)
            start, number = stop, number + 1
    drawn = [each.tiles for row in rows for each in row if each.tiles is not None]
    num_tiles = sum(map(len, drawn))
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        segments=segments,
        parents=torch.full(shape, NO_PARENT),
        tiles=torch.cat(drawn) if drawn else None,
        tokens_per_tile=torch.full((num_tiles,), TOKENS_PER_TILE),
        visual_index=(input_ids == IMAGE).flatten().nonzero().squeeze(1),
        target_index=torch.tensor(predictors),
        target_ids=torch.tensor(targets),
        target_weights=torch.tensor(weights),
        target_samples=torch.tensor(samples),
        sources=tuple(str(n) for n in range(number)),
    )


def packed_batch(tiles: Sequence[Sequence[int]]) -> Batch:
    """One row of samples with images of so many tiles."""
    return pack([[sample(each, seed=number) for number, each in enumerate(tiles)]])


def head(batch: Batch) -> Callable[[Tensor, slice], Tensor]:
    """Negative log-likelihood of every target."""

    def score(logits: Tensor, place: slice) -> Tensor:
        logprobs = logits.float().log_softmax(-1)
        return -logprobs.gather(-1, batch.target_ids[place, None]).squeeze(-1)

    return score
