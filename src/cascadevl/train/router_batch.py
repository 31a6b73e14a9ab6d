"""Batches of labelled tiles: features that are not computed twice, in an order that resumes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cascadevl.data.permutation import mix, named_key, permuted
from cascadevl.data.tiling import normalise
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.types import Example


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledRecord:
    """A record whose tiles have labels.

    Attributes:
        position: Number of its draw.
        source: Its name, for errors.
        keep: The label of each tile.
        weights: What each tile weighs.
    """

    position: int
    source: str
    keep: Bool[Tensor, " tiles"]
    weights: Float[Tensor, " tiles"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TileBatch:
    """Tiles of some records, as the router sees them.

    Attributes:
        patches: Their patch features.
        keep: Their labels.
        weights: What they weigh.
        sources: The records.
    """

    patches: Float[Tensor, "tiles patches channels"]
    keep: Bool[Tensor, " tiles"]
    weights: Float[Tensor, " tiles"]
    sources: tuple[str, ...]

    def to(self, device: torch.device | str) -> TileBatch:
        """The same batch on another device."""
        return replace(
            self,
            patches=self.patches.to(device, non_blocking=True),
            keep=self.keep.to(device, non_blocking=True),
            weights=self.weights.to(device, non_blocking=True),
        )

    @property
    def num_tokens(self) -> int:
        """None: the language half is not asked."""
        return 0

    @property
    def num_tiles(self) -> int:
        """Tiles of all records."""
        return len(self.keep)


class TileFeatures:
    """Patch features of records, by the numbers of their draws; the latest ones are kept.

    The vision tower is frozen. A record is always encoded by itself, so that its features are the
    same to the last bit whether they were kept or not.
    """

    def __init__(
        self,
        model: CascadeVLForConditionalGeneration,
        build: Callable[[int], Example],
        *,
        max_bytes: int,
    ) -> None:
        """Bind the model.

        Args:
            model: In evaluation mode.
            build: The example of a draw.
            max_bytes: Of features that are kept, on the CPU.
        """
        self._model, self._build, self._room = model, build, max_bytes
        self._kept: OrderedDict[int, Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, position: int) -> Float[Tensor, "tiles patches channels"]:
        """The features of a record's tiles, on the CPU.

        Args:
            position: Number of its draw.

        Raises:
            DataError: If the record cannot be read any more.
        """
        if position in self._kept:
            self._kept.move_to_end(position)
            return self._kept[position]
        pixels = normalise(self._build(position).tiles, self._model.device)
        found: Tensor = self._model.model.patch_features(pixels).cpu()
        self._kept[position] = found
        self._room -= found.nbytes
        while self._room < 0 and self._kept:
            self._room += self._kept.popitem(last=False)[1].nbytes
        return found


class TileStream:
    """Endless batches of labelled records, every epoch in an order of its own.

    The order is a function of the seed and the number of the record in the run, whatever the number
    of processes.
    """

    def __init__(
        self,
        records: Sequence[LabelledRecord],
        features: Callable[[int], Tensor],
        *,
        seed: int,
        num_records: int,
        rank: int = 0,
        world_size: int = 1,
        skipped: Sequence[tuple[str, str, int, str]] = (),
    ) -> None:
        """Start at the first record.

        Args:
            records: At least one.
            features: The patch features of a draw.
            seed: Of the order.
            num_records: Records of a batch.
            rank: Which of the processes this is.
            world_size: Their number; each takes its own records of every round.
            skipped: What measuring left out: data set, kind, number, and the first in words.
        """
        self._records, self._features = records, features
        self._key, self._num_records = named_key(seed, "router"), num_records
        self._rank, self._world_size = rank, world_size
        self._skipped = [list(each) for each in skipped]
        self._cursor = 0  # records that all processes together have taken

    def __next__(self) -> TileBatch:
        """The next batch."""
        first = self._cursor + self._rank * self._num_records
        self._cursor += self._world_size * self._num_records
        chosen = [self._at(number) for number in range(first, first + self._num_records)]
        return TileBatch(
            patches=torch.cat([self._features(record.position) for record in chosen]),
            keep=torch.cat([record.keep for record in chosen]),
            weights=torch.cat([record.weights for record in chosen]),
            sources=tuple(record.source for record in chosen),
        )

    def _at(self, number: int) -> LabelledRecord:
        epoch, within = divmod(number, len(self._records))
        return self._records[permuted(within, len(self._records), mix(self._key + epoch))]

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, the same on all processes but for what was left out."""
        skipped = self._skipped if self._rank == 0 else []
        return {"cursor": self._cursor, "world_size": None, "skipped": skipped}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go to where a state was taken."""
        self._cursor = int(state["cursor"])
