"""Visual tokens of tiles: encoded for many requests at once, and kept for a next question.

What is kept is found by the content of a tile, up to a limit of bytes, the longest unused is let go
first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cascadevl.data.tiling import normalise
from cascadevl.engine.jobs import Chunk, Job
from cascadevl.engine.prompts import Tile
from cascadevl.engine.scheduler import Limit
from cascadevl.model.modeling import CascadeVLForConditionalGeneration

TilesOf: TypeAlias = Callable[[Job], Sequence[Tile]]
"""Gives the tiles of a job's prompt."""

Visual: TypeAlias = Callable[[Chunk], Tensor | None]
"""Gives the visual tokens of a chunk, in order, or None if it has none."""

_FIXED_TILES = 4
"""Tiles encoded at once where each is to be encoded with the same operations always."""


class VisionCache:
    """Encodes tiles with one model and keeps what it has encoded."""

    def __init__(
        self,
        model: CascadeVLForConditionalGeneration,
        max_bytes: int,
        *,
        batch_invariant: bool = False,
    ) -> None:
        """Begin with nothing.

        Args:
            model: Encodes.
            max_bytes: Memory for what is kept between steps.
            batch_invariant: Encode tiles in groups of a fixed size, filled up with black ones.
        """
        self.model, self.max_bytes, self.batch_invariant = model, max_bytes, batch_invariant
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()  # longest unused first
        self._bytes = 0
        self.num_encoded = 0
        self.num_found = 0

    def knows(self, key: bytes) -> bool:
        """Whether the visual tokens of a tile are there."""
        return key in self._kept

    def forget(self) -> None:
        """Forget everything, for new weights."""
        self._kept.clear()
        self._bytes = 0

    def limit(self, tiles_of: TilesOf, most: int) -> Limit:
        """How far the chunks of a step may go, so that it does not encode more tiles than it may.

        Args:
            tiles_of: Tiles of a job.
            most: How many; one chunk may always need more where chunks may not be cut.
        """
        planned: set[bytes] = set()

        def limit(job: Job, start: int, stop: int) -> int:
            new = [
                tile
                for tile in tiles_between(tiles_of(job), start, stop)
                if tile.features is None and not self.knows(tile.key)
            ]
            if self.batch_invariant:
                if planned and len(planned.union(tile.key for tile in new)) > most:
                    return start
                planned.update(tile.key for tile in new)
                return stop
            for tile in new:
                if len(planned | {tile.key}) > most:
                    return max(start, tile.start)
                planned.add(tile.key)
            return stop

        return limit

    def of_chunks(self, chunks: Sequence[Chunk], tiles_of: TilesOf) -> Visual:
        """Make the visual tokens of all chunks at once; a function that gives those of each."""
        between = {
            chunk: tiles_between(tiles_of(chunk.job), chunk.start, chunk.stop) for chunk in chunks
        }
        tiles = [tile for each in between.values() for tile in each]
        features = dict(zip(tiles, self.features(tiles), strict=True))

        def visual(chunk: Chunk) -> Tensor | None:
            mine = between[chunk]
            if not mine:
                return None
            return visual_rows(mine, [features[tile] for tile in mine], chunk.start, chunk.stop)

        return visual

    @torch.inference_mode()
    def features(self, tiles: Sequence[Tile]) -> list[Float[Tensor, "visual_tokens hidden"]]:
        """Visual tokens of tiles, each encoded once however often it occurs."""
        if not tiles:
            return []
        model = self.model
        found = {tile.key: tile.features for tile in tiles if tile.features is not None}
        new = {
            tile.key: tile for tile in tiles if tile.key not in found and not self.knows(tile.key)
        }
        for tile in tiles:
            if tile.key in self._kept:
                self._kept.move_to_end(tile.key)
                self.num_found += 1
        if new:
            pixels = [tile.pixels for tile in new.values()]
            encoded = self._encode([each for each in pixels if each is not None])
            assert len(encoded) == len(new), "a tile has neither pixels nor features"
            for key, projected in zip(new, encoded, strict=True):
                self._keep(key, projected)
        given = {
            key: each.to(model.device, model.dtype)
            for key, each in found.items()
            if each is not None
        }
        result = [given[tile.key] if tile.key in given else self._kept[tile.key] for tile in tiles]
        self._shrink()
        return result

    def _encode(self, pixels: list[np.ndarray]) -> list[Tensor]:
        self.num_encoded += len(pixels)
        if not self.batch_invariant:
            values = normalise(np.stack(pixels)).to(self.model.device)
            return list(self.model.encode_images(values).projected)
        encoded: list[Tensor] = []
        for start in range(0, len(pixels), _FIXED_TILES):
            part = pixels[start : start + _FIXED_TILES]
            filled = np.zeros((_FIXED_TILES, *part[0].shape), dtype=np.uint8)
            filled[: len(part)] = part
            values = normalise(filled).to(self.model.device)
            encoded += list(self.model.encode_images(values).projected[: len(part)])
        return encoded

    def _keep(self, key: bytes, projected: Tensor) -> None:
        own = projected.clone()  # a view would keep the whole batch alive
        self._kept[key] = own
        self._bytes += own.nbytes

    def _shrink(self) -> None:
        while self._bytes > self.max_bytes:
            _, projected = self._kept.popitem(last=False)
            self._bytes -= projected.nbytes


def tiles_between(tiles: Sequence[Tile], start: int, stop: int) -> list[Tile]:
    """Tiles that have visual tokens between two places."""
    return [tile for tile in tiles if tile.start < stop and tile.stop > start]


def visual_rows(
    tiles: Sequence[Tile], features: Sequence[Tensor], start: int, stop: int
) -> Float[Tensor, "visual hidden"]:
    """Those visual tokens of consecutive tiles that lie between two places."""
    parts = [
        each[max(start - tile.start, 0) : max(stop - tile.start, 0)]
        for tile, each in zip(tiles, features, strict=True)
    ]
    return torch.cat(parts)
