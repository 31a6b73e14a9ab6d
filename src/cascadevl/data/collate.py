"""From examples to the tensors of one model call: expansion, packing side by side, targets.

This runs in front of every training step, so everything is one numpy operation over all the
tokens of the batch; the only loops are over samples. Three rules are decided here: no token is
predicted from another sample, a branch's first token is predicted from the end of what it
continues, and the weight of a target depends on the length of its own sample alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from cascadevl.errors import DataError
from cascadevl.losses.next_token import Averaging, sample_weights
from cascadevl.sequence import Expanded, expand, tokens_per_image
from cascadevl.types import NO_PARENT, PADDING_SEGMENT, Batch, Example


def collate(
    rows: Sequence[Sequence[Example]],
    *,
    image_token_id: int,
    pad_token_id: int,
    tokens_per_tile: int,
    averaging: Averaging,
    ceil_after_image: bool = False,
    pad_to: int | None = None,
) -> Batch:
    """Lay out examples as packed rows and list what is to be predicted.

    Each conversation, and each branch of one, is a sample of its own: it has one entry in
    ``Batch.sources`` (a branch as ``source#segment``) and its own number of targets for the
    weights. Segments are numbered from 0 within each row.

    Args:
        rows: The examples of each row, in order.
        image_token_id: The image-context token.
        pad_token_id: Fills the ends of shorter rows.
        tokens_per_tile: Visual tokens of a tile for which its example does not say another number.
        averaging: How the weight of a target falls with its sample's number of targets.
        ceil_after_image: Round the position up after each image (docs/decisions/0003).
        pad_to: Tokens of every row, for fixed shapes; by default those of the longest row.

    Raises:
        DataError: If an example's image slots, tiles and increments do not agree, or a row is
            longer than ``pad_to``.
    """
    examples = [example for row in rows for example in row]
    samples = _Samples.of(examples)
    expanded = _expand(
        examples, samples, image_token_id, tokens_per_tile, ceil_after_image=ceil_after_image
    )
    grid = _Grid.of(rows, tokens_per_tile, pad_to)
    starts = np.searchsorted(expanded.segments, np.arange(len(samples.parents) + 1))
    predictor = _predictors(starts, samples.parents)
    targets = np.flatnonzero(expanded.trained & (predictor >= 0))
    target_samples = expanded.segments[targets]
    num_targets = np.bincount(target_samples, minlength=len(samples.parents))
    weights = sample_weights(torch.from_numpy(num_targets), averaging)
    first_segment = np.repeat(samples.first_of_row(rows), grid.row_lengths)
    tiles = [example.tiles for example in examples if example.num_tiles > 0]
    return Batch(
        input_ids=grid.place(expanded.input_ids, pad_token_id),
        position_ids=grid.place(expanded.position_ids, 0),
        segments=grid.place(expanded.segments - first_segment, PADDING_SEGMENT),
        parents=grid.place(
            np.where(expanded.parents == NO_PARENT, NO_PARENT, expanded.parents - first_segment),
            NO_PARENT,
        ),
        tiles=torch.from_numpy(np.concatenate(tiles)) if tiles else None,
        tokens_per_tile=torch.tensor(_counts(examples, tokens_per_tile), dtype=torch.int64),
        visual_index=torch.from_numpy(grid.flat_index[expanded.is_visual]),
        target_index=torch.from_numpy(grid.flat_index[predictor[targets]]),
        target_ids=torch.from_numpy(expanded.input_ids[targets]),
        target_weights=weights[torch.from_numpy(target_samples)],
        target_samples=torch.from_numpy(target_samples),
        sources=tuple(samples.sources),
    )


@dataclass(frozen=True, slots=True)
class _Samples:
    """The segments of all examples, numbered through the whole batch."""

    parents: list[int]
    sources: list[str]
    first: list[int]  # number of each example's first segment

    @classmethod
    def of(cls, examples: Sequence[Example]) -> _Samples:
        parents: list[int] = []
        sources: list[str] = []
        first: list[int] = []
        for example in examples:
            offset = len(parents)
            first.append(offset)
            if len(example.parents) == 1:
                parents.append(NO_PARENT)
                sources.append(example.source)
                continue
            parents += [p if p == NO_PARENT else p + offset for p in example.parents]
            sources += [f"{example.source}#{number}" for number in range(len(example.parents))]
        return cls(parents, sources, first)

    def first_of_row(self, rows: Sequence[Sequence[Example]]) -> list[int]:
        """Number of the first segment of every row (of an empty row: of no meaning)."""
        starts = np.cumsum([0, *map(len, rows)])[:-1].tolist()
        return [self.first[start] if start < len(self.first) else 0 for start in starts]


@dataclass(frozen=True, slots=True)
class _Grid:
    """Where the tokens of all rows, one behind the other, lie in the padded batch."""

    row_lengths: list[int]
    width: int
    flat_index: Int64[np.ndarray, " tokens"]

    @classmethod
    def of(
        cls, rows: Sequence[Sequence[Example]], tokens_per_tile: int, pad_to: int | None
    ) -> _Grid:
        lengths = [sum(num_tokens(example, tokens_per_tile) for example in row) for row in rows]
        longest = max(lengths, default=0)
        width = longest if pad_to is None else pad_to
        if longest > width:
            raise DataError(
                f"a row has {longest} tokens, but rows are padded to {width}",
                kind="too_long",
                source=rows[lengths.index(longest)][0].source,
                remedy="raise pad_to or pack shorter rows",
            )
        gaps = np.arange(len(rows)) * width - np.cumsum([0, *lengths])[:-1]
        return cls(lengths, width, np.arange(sum(lengths)) + np.repeat(gaps, lengths))

    def place(self, values: Shaped[np.ndarray, " tokens"], filling: int) -> Shaped[Tensor, "r t"]:
        """The values as (rows, tokens), the ends of the rows filled."""
        placed = np.full(len(self.row_lengths) * self.width, filling, dtype=values.dtype)
        placed[self.flat_index] = values
        return torch.from_numpy(placed.reshape(len(self.row_lengths), self.width))


def num_tokens(example: Example, tokens_per_tile: int) -> int:
    """Tokens of an example once each image slot is expanded to its visual tokens."""
    num_visual = sum(example.tiles_per_image) * tokens_per_tile
    if example.tokens_per_tile:
        num_visual = sum(example.tokens_per_tile)
    return len(example.input_ids) - len(example.tiles_per_image) + num_visual


def _counts(examples: Sequence[Example], tokens_per_tile: int) -> list[int]:
    """Visual tokens of every tile."""
    return [
        number
        for example in examples
        for number in example.tokens_per_tile or (tokens_per_tile,) * example.num_tiles
    ]


def _expand(
    examples: Sequence[Example],
    samples: _Samples,
    image_token_id: int,
    tokens_per_tile: int,
    *,
    ceil_after_image: bool,
) -> Expanded:
    """Expand all examples as if they were one: segments without a parent start anew anyway."""
    input_ids = np.concatenate([example.input_ids for example in examples])
    lengths = [len(example.input_ids) for example in examples]
    _check_images(examples, lengths, input_ids == image_token_id)
    return expand(
        input_ids,
        np.concatenate([example.trained for example in examples]),
        np.concatenate([example.segments for example in examples])
        + np.repeat(samples.first, lengths),
        samples.parents,
        image_token_id=image_token_id,
        tokens_per_image=tokens_per_image(
            [number for example in examples for number in example.tiles_per_image],
            _counts(examples, tokens_per_tile),
        ),
        increments=[increment for e in examples for increment in e.increments],
        ceil_after_image=ceil_after_image,
    )


def _check_images(
    examples: Sequence[Example], lengths: Sequence[int], is_slot: Bool[np.ndarray, " slots"]
) -> None:
    ends = np.cumsum(lengths)
    slots = np.diff(np.cumsum(is_slot)[ends - 1], prepend=0).tolist()
    for example, num_slots in zip(examples, slots, strict=True):
        num_images = len(example.tiles_per_image)
        num_tiles = sum(example.tiles_per_image)
        num_counts = len(example.tokens_per_tile) or num_tiles
        if not (
            num_slots == num_images == len(example.increments)
            and num_tiles == len(example.tiles) == num_counts
        ):
            raise DataError(
                f"{num_slots} image slots in the text for {num_images} images with {num_tiles} "
                f"tiles, but {len(example.tiles)} tiles, {len(example.increments)} increments and "
                f"{num_counts} numbers of visual tokens are there",
                kind="image_count",
                source=example.source,
            )


def _predictors(
    starts: Int64[np.ndarray, " borders"], parents: Sequence[int]
) -> Int64[np.ndarray, " tokens"]:
    """Index of the token that predicts each token, -1 for the first token of a conversation."""
    predictor = np.arange(-1, int(starts[-1]) - 1)
    assert (np.diff(starts) > 0).all(), "segments are numbered without gaps"
    ends = (starts[1:] - 1).tolist()
    predictor[starts[:-1]] = [-1 if p == NO_PARENT else ends[p] for p in parents]
    return predictor
