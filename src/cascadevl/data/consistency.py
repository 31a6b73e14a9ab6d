"""Samples with compressed tiles as rows, each with what a reference thinks of it with full ones.

Compression changes how many visual tokens a picture has and nothing else: the targets of a sample
are the same, one by one, whether its tiles are full or not (InternVL3.5 report, ViCO).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Int64
from torch import Tensor

from cascadevl.data.stream import CollateConfig
from cascadevl.errors import TrainingError
from cascadevl.losses.vico import TopTokens
from cascadevl.types import Batch, Example

View: TypeAlias = Literal["text", "full", "compressed", "mixed"]
"""How a sample is seen: without a picture, with full tiles, with compressed ones, with both."""

VIEWS: tuple[View, ...] = get_args(View)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ConsistencyBatch:
    """Packed rows of samples, some of whose pictures are compressed.

    Attributes:
        packed: The rows as the model in training sees them.
        full: The same samples with full tiles, for a reference that is asked at every step; None
            where it was asked before.
        reference: What the reference thought of each target; None where it is asked at every step.
        views: How the sample of each target is seen, an index into ``VIEWS``.
        sources: Where the samples came from.
    """

    packed: Batch
    full: Batch | None
    reference: TopTokens | None
    views: Int64[Tensor, " targets"]
    sources: tuple[str, ...]

    def to(self, device: torch.device | str) -> ConsistencyBatch:
        """The same batch on another device."""
        packed = self.packed.to(device)
        full = None if self.full is None else self.full.to(device)
        if full is not None:  # the tiles are the same ones, there too
            full = replace(full, tiles=packed.tiles)
        return replace(
            self,
            packed=packed,
            full=full,
            reference=None if self.reference is None else self.reference.to(device),
            views=self.views.to(device, non_blocking=True),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens that the model in training sees and that are not padding."""
        return self.packed.num_tokens

    @property
    def num_tiles(self) -> int:
        """Tiles of all samples."""
        return self.packed.num_tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsistencyCollate:
    """How rows of samples become tensors.

    Attributes:
        packed: How rows of any examples do.
        known: What the reference thought of the targets of an example; None if it is to be asked
            at every step.
    """

    packed: CollateConfig
    known: Callable[[Example], TopTokens | None] | None = None

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of a full tile."""
        return self.packed.tokens_per_tile

    def __call__(self, rows: list[list[Example]]) -> ConsistencyBatch:
        """Collate rows of examples.

        Raises:
            TrainingError: If what the reference thought of an example is not known.
        """
        examples = [example for row in rows for example in row]
        packed = self.packed(rows)
        return ConsistencyBatch(
            packed=packed,
            full=self._full(rows, packed) if self.known is None else None,
            reference=None if self.known is None else self._known(examples, packed),
            views=views_of(examples, packed, self.tokens_per_tile),
            sources=tuple(example.source for example in examples),
        )

    def _full(self, rows: Sequence[Sequence[Example]], packed: Batch) -> Batch:
        """The same samples with full tiles; their rows may be longer than the limit."""
        seen = replace(self.packed, pad_to=None)(
            [[with_full_tiles(e) for e in row] for row in rows]
        )
        return replace(seen, tiles=packed.tiles)

    def _known(self, examples: Sequence[Example], packed: Batch) -> TopTokens | None:
        assert self.known is not None
        parts = []
        for example, number in zip(examples, targets_of(examples, packed), strict=True):
            part = self.known(example)
            if part is None or len(part) != number:
                raise TrainingError(
                    f"{example.source}: what the reference model thinks of this sample was not "
                    "computed before training; the data have changed since: put them back, or "
                    "start a new run in another run.out"
                )
            parts.append(part)
        return TopTokens.joined(parts)


def with_full_tiles(example: Example) -> Example:
    """The example without its compression."""
    return replace(example, tokens_per_tile=())


def view_of(example: Example, tokens_per_tile: int) -> View:
    """How a sample is seen.

    Args:
        example: The sample.
        tokens_per_tile: Visual tokens of a full tile.
    """
    if not example.num_tiles:
        return "text"
    counts = set(example.tokens_per_tile or (tokens_per_tile,))
    if counts == {tokens_per_tile}:
        return "full"
    return "mixed" if tokens_per_tile in counts else "compressed"


def targets_of(examples: Sequence[Example], batch: Batch) -> list[int]:
    """How many targets each example has in a batch of them.

    Args:
        examples: The examples, row after row.
        batch: Their batch.
    """
    segments = torch.tensor([len(example.parents) for example in examples])
    owners = torch.repeat_interleave(torch.arange(len(examples)), segments)
    counted = torch.bincount(owners[batch.target_samples], minlength=len(examples))
    numbers: list[int] = counted.tolist()
    return numbers


def views_of(
    examples: Sequence[Example], batch: Batch, tokens_per_tile: int
) -> Int64[Tensor, " targets"]:
    """How the sample of each target of a batch is seen, as an index into ``VIEWS``.

    Args:
        examples: The examples, row after row.
        batch: Their batch.
        tokens_per_tile: Visual tokens of a full tile.
    """
    views = torch.tensor([VIEWS.index(view_of(e, tokens_per_tile)) for e in examples])
    return torch.repeat_interleave(views, torch.tensor(targets_of(examples, batch)))
