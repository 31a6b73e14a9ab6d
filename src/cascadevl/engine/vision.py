"""What tiles show: encoded for many requests at once, and kept for a next question.

What is kept is found by the content of a tile, up to a limit of bytes, the longest unused is let go
first. Of a plain model visual tokens are kept. Of one with a router it is what does not depend on a
request: patch features, of which full and compressed visual tokens are made when they are needed,
and the router's probability. So a picture that is asked about with another budget is not encoded
again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cascadevl.data.tiling import normalise
from cascadevl.engine.contents import Content
from cascadevl.engine.jobs import Chunk, Job
from cascadevl.engine.prompts import Tile, tiles_of
from cascadevl.engine.scheduler import Limit
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.types import VisualFeatures

TilesOf: TypeAlias = Callable[[Job], Sequence[Tile]]
"""Gives the tiles of a job's prompt."""

Visual: TypeAlias = Callable[[Chunk], Tensor | None]
"""Gives the visual tokens of a chunk, in order, or None if it has none."""

_FIXED_TILES = 4
"""Tiles encoded at once where each is to be encoded with the same operations always."""

_CPU_PATCHES = 2048
"""Patches encoded at once on a CPU, so that activations of a layer stay in the cache between its
products: of released tiles one or two, of small models' tiles many."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """What is known of a tile, whatever is asked about it.

    Attributes:
        projected: Its visual tokens, where no router decides how many there are.
        patches: Its patch features otherwise.
        compress: With them, the router's probability of compressing it.
    """

    projected: Float[Tensor, "visual_tokens hidden"] | None = None
    patches: Float[Tensor, "patches channels"] | None = None
    compress: Float[Tensor, ""] | None = None

    @property
    def num_bytes(self) -> int:
        """Its memory."""
        held = (self.projected, self.patches, self.compress)
        return sum(each.nbytes for each in held if each is not None)


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
        self._kept: OrderedDict[bytes, Encoded] = OrderedDict()  # longest unused first
        self._unused: set[bytes] = set()  # encoded for the router, and not read since
        self._bytes = 0
        self.num_encoded = 0
        self.num_found = 0

    def knows(self, content: Content) -> bool:
        """Whether a tile need not be encoded."""
        came_encoded = content.features is not None or content.patches is not None
        return came_encoded or content.key in self._kept

    def forget(self) -> None:
        """Forget everything, for new weights."""
        self._kept.clear()
        self._unused.clear()
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
                if not self.knows(tile.content)
            ]
            if self.batch_invariant:
                keys = {tile.content.key for tile in new}
                if planned and len(planned | keys) > most:
                    return start
                planned.update(keys)
                return stop
            for tile in new:
                if len(planned | {tile.content.key}) > most:
                    return max(start, tile.start)
                planned.add(tile.content.key)
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
        model = self.model
        to_make = [tile for tile in tiles if tile.content.features is None]
        contents = [tile.content for tile in to_make]
        self._count_found(contents)
        made = self._visual(to_make, self._encoded(contents))
        result = [
            made[tile.content.key, tile.num_tokens]
            if tile.content.features is None
            else tile.content.features.to(model.device, model.dtype)
            for tile in tiles
        ]
        self._shrink()
        return result

    @torch.inference_mode()
    def probabilities(self, contents: Sequence[Content]) -> Float[Tensor, " tiles"]:
        """The router's probability of compressing each of some tiles.

        Args:
            contents: At least one tile, whose visual tokens are not made yet.
        """
        new = {content.key for content in contents if not self.knows(content)}
        encoded = self._encoded(contents)
        self._unused |= new
        chances = [encoded[content.key].compress for content in contents]
        self._shrink()
        return torch.stack([each for each in chances if each is not None])

    def _count_found(self, contents: Sequence[Content]) -> None:
        for content in contents:
            if content.key in self._kept:
                self._kept.move_to_end(content.key)
                self.num_found += content.key not in self._unused
                self._unused.discard(content.key)

    def _encoded(self, contents: Sequence[Content]) -> dict[bytes, Encoded]:
        """What is known of tiles by their keys; what is not known yet is encoded, all at once."""
        new = {content.key: content for content in contents if not self.knows(content)}
        if new:
            pixels = [content.pixels for content in new.values()]
            encoded = self._encode([each for each in pixels if each is not None])
            assert len(encoded) == len(new), "a tile has neither pixels nor features"
            for key, each in zip(new, encoded, strict=True):
                self._kept[key] = each
                self._bytes += each.num_bytes
        return {
            content.key: self._kept[content.key]
            if content.patches is None
            else self._given(content)
            for content in contents
        }

    def _given(self, content: Content) -> Encoded:
        """What came with a request."""
        device, dtype = self.model.device, self.model.dtype
        assert content.patches is not None, "asked for"
        chance = None if content.compress is None else content.compress.to(device, dtype)
        return Encoded(patches=content.patches.to(device, dtype), compress=chance)

    def _encode(self, pixels: list[np.ndarray]) -> list[Encoded]:
        self.num_encoded += len(pixels)
        size = _FIXED_TILES if self.batch_invariant else self._together(len(pixels))
        encoded: list[Encoded] = []
        for start in range(0, len(pixels), size):
            part = pixels[start : start + size]
            rows = size if self.batch_invariant else len(part)
            filled = np.zeros((rows, *part[0].shape), dtype=np.uint8)
            filled[: len(part)] = part
            features = self.model.encode_images(normalise(filled, self.model.device))
            encoded += [_of_tile(features, number) for number in range(len(part))]
        return encoded

    def _together(self, num_tiles: int) -> int:
        """How many of some tiles are encoded at once."""
        if self.model.device.type != "cpu":
            return num_tiles
        return min(num_tiles, max(1, _CPU_PATCHES // self.model.config.patches_per_tile))

    def _visual(
        self, tiles: Sequence[Tile], encoded: Mapping[bytes, Encoded]
    ) -> dict[tuple[bytes, int], Tensor]:
        """Visual tokens of tiles by key and number; what is kept as patch features is projected."""
        made: dict[tuple[bytes, int], Tensor] = {}
        open_: dict[int, list[bytes]] = {}  # tiles to project, by their number of visual tokens
        for key, number in dict.fromkeys((tile.content.key, tile.num_tokens) for tile in tiles):
            projected = encoded[key].projected
            if projected is None:
                open_.setdefault(number, []).append(key)
            else:
                made[key, number] = projected
        for number, keys in open_.items():
            size = _FIXED_TILES if self.batch_invariant else len(keys)
            for start in range(0, len(keys), size):
                part = keys[start : start + size]
                patches = [encoded[key].patches for key in part]
                held = torch.stack([each for each in patches if each is not None])
                filled = held.new_zeros(size, *held.shape[1:])
                filled[: len(part)] = held
                counts = torch.full((size,), number, device=held.device)
                visual = self.model.model.project(filled, counts).unflatten(0, (size, number))
                made |= {(key, number): tokens for key, tokens in zip(part, visual, strict=False)}
        return made

    def _shrink(self) -> None:
        while self._bytes > self.max_bytes:
            key, encoded = self._kept.popitem(last=False)
            self._unused.discard(key)
            self._bytes -= encoded.num_bytes


def tile_encoder(
    model: CascadeVLForConditionalGeneration, max_bytes: int = 2**28
) -> Callable[[UInt8[np.ndarray, "tiles px px 3"]], Float[Tensor, "visual hidden"]]:
    """A function that gives the visual tokens of tiles, all full, and remembers them.

    Args:
        model: Encodes.
        max_bytes: Memory for what is remembered.
    """
    cache = VisionCache(model, max_bytes)

    def encode(tiles: UInt8[np.ndarray, "tiles px px 3"]) -> Float[Tensor, "visual hidden"]:
        return torch.cat(cache.features(tiles_of(tiles, model.config)))

    return encode


def _of_tile(features: VisualFeatures, number: int) -> Encoded:
    """One tile of those encoded together; a copy, because a view would keep all of them alive."""

    def own(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[number].clone()

    return Encoded(own(features.projected), own(features.patches), own(features.compress))


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
