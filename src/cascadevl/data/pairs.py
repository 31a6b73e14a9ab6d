"""Pairs of answers to one prompt, a chosen and a rejected one, as examples and as packed rows.

A pair is a record whose messages are the prompt and whose two branches are the answers, so that
prompt and pictures are in a row once for both (docs/decisions/0004). In every epoch it is the very
same example: what the reference model thinks of it is computed once, before training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cascadevl.data.stream import Builder, Collate
from cascadevl.errors import DataError, TrainingError
from cascadevl.types import Batch, Example, Record


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairBatch:
    """Packed rows of pairs.

    Attributes:
        packed: The rows. Its samples are the segments of the pairs: what is shared, and answers.
        chosen: Sample number of each pair's chosen answer.
        rejected: Sample number of each pair's rejected answer.
        reference: Log-probability of the chosen (first row) and the rejected answers under the
            reference model; None where it is not known yet.
        sources: Where the pairs came from.
    """

    packed: Batch
    chosen: Int64[Tensor, " pairs"]
    rejected: Int64[Tensor, " pairs"]
    reference: Float[Tensor, "2 pairs"] | None
    sources: tuple[str, ...]

    def to(self, device: torch.device | str) -> PairBatch:
        """The same batch on another device."""
        return replace(
            self,
            packed=self.packed.to(device),
            chosen=self.chosen.to(device, non_blocking=True),
            rejected=self.rejected.to(device, non_blocking=True),
            reference=(
                None if self.reference is None else self.reference.to(device, non_blocking=True)
            ),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding; those of a prompt count once."""
        return self.packed.num_tokens

    @property
    def num_tiles(self) -> int:
        """Tiles of all pairs."""
        return self.packed.num_tiles


@dataclass(frozen=True, slots=True)
class PairBuilder:
    """Makes the example of a pair: in every epoch the same, with the two answers as its targets.

    Attributes:
        builder: Makes examples of records.
    """

    builder: Builder

    def __call__(self, record: Record, *, epoch: int = 0) -> Example:
        """Make the example.

        Args:
            record: The pair: two branches, the chosen answer first.
            epoch: Of no influence.

        Raises:
            DataError: If the record is no pair (kind ``not_a_pair``) or cannot be used.
        """
        del epoch
        if len(record.branches) != 2:
            raise DataError(
                f"the record has {len(record.branches)} branches; a pair has two, the chosen and "
                "the rejected answer",
                kind="not_a_pair",
                source=record.source,
                remedy="give preference data, such as lines with question, chosen and rejected",
            )
        if record.branches[0] == record.branches[1]:
            raise DataError(
                "chosen and rejected answer are the same",
                kind="not_a_pair",
                source=record.source,
                remedy="leave the pair out: it teaches nothing",
            )
        example = self.builder(record)
        answers = example.segments >= len(example.parents) - 2
        return replace(example, trained=example.trained & answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCollate:
    """How rows of pairs become tensors.

    Attributes:
        packed: How rows of any examples do.
        reference: Log-probabilities of the chosen and the rejected answer under the reference
            model, by the `digest` of the pair's example; None to leave them out.
    """

    packed: Collate[Batch]
    reference: Mapping[bytes, tuple[float, float]] | None = None

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of a tile."""
        return self.packed.tokens_per_tile

    def __call__(self, rows: list[list[Example]]) -> PairBatch:
        """Collate rows of pairs.

        Raises:
            TrainingError: If the reference log-probabilities of a pair are not known.
        """
        examples = [example for row in rows for example in row]
        ends = torch.tensor([len(example.parents) for example in examples]).cumsum(0)
        return PairBatch(
            packed=self.packed(rows),
            chosen=ends - 2,
            rejected=ends - 1,
            reference=None if self.reference is None else self._reference(examples),
            sources=tuple(example.source for example in examples),
        )

    def _reference(self, examples: Sequence[Example]) -> Float[Tensor, "2 pairs"]:
        assert self.reference is not None
        found = [self.reference.get(digest(example)) for example in examples]
        values = [value for value in found if value is not None]
        if len(values) < len(found):
            lost = next(e.source for e, value in zip(examples, found, strict=True) if value is None)
            raise TrainingError(
                f"{lost}: what the reference model thinks of this pair was not computed before "
                "training; the data have changed since: put them back, or start a new run in "
                "another run.out"
            )
        return torch.tensor(values, dtype=torch.float32).T.contiguous()


def digest(example: Example) -> bytes:
    """16 bytes that tell pairs apart by all that a model sees of them.

    The record's identity is in them, and what seed, tiling, increment and tokenizer made of it.
    """
    shapes = (example.record_id, example.parents, example.tiles_per_image, example.increments)
    found = hashlib.blake2b(repr(shapes).encode("utf-8", "surrogatepass"), digest_size=16)
    for values in (example.input_ids, example.segments, example.trained, example.tiles):
        found.update(np.ascontiguousarray(values).data)
    return found.digest()
