"""From a request to a prompt: its tokens, where they sit, and what makes the visual ones.

The one place where a request is held against the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from cascadevl.engine.cache import PromptTokens
from cascadevl.engine.requests import ImageFeatures, PromptPart, Request, TextIds
from cascadevl.errors import RequestError
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.v2pe import Increments, increments_of
from cascadevl.sequence import expand
from cascadevl.types import NO_PARENT, Example, VisualFeatures


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """One tile of a prompt.

    Attributes:
        start: Place of its first visual token.
        stop: Place behind its last one.
        key: Equal only for equal contents.
        pixels: What it looks like, if it is to be encoded.
        features: Its visual tokens, if they came with the request.
    """

    start: int
    stop: int
    key: bytes
    pixels: UInt8[np.ndarray, "px px 3"] | None = None
    features: Float[Tensor, "visual_tokens hidden"] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What a request asks, ready to be computed.

    Attributes:
        tokens: Its tokens and positions.
        tiles: Its tiles, in the order of their tokens.
        increments: Position step of each picture's visual tokens.
    """

    tokens: PromptTokens
    tiles: tuple[Tile, ...]
    increments: tuple[float, ...]

    @property
    def num_visual(self) -> int:
        """Visual tokens among the tokens."""
        return sum(tile.stop - tile.start for tile in self.tiles)


def prepare(request: Request, config: CascadeVLConfig) -> Prompt:
    """Put the visual tokens of a request in their places.

    Args:
        request: What is asked.
        config: Of the model that is asked.

    Raises:
        RequestError: If the prompt and the tokens asked for do not fit the trained context, a
            part does not fit the model, increments are not as many as pictures, or an example has
            branches.
    """
    if isinstance(request.prompt, Example):
        ids, pictures, given = _of_example(request.prompt, config)
        source = request.prompt.source
    else:
        ids, pictures, given = _of_parts(request.prompt, config)
        source = "the prompt"
    if request.increments is not None:
        given = request.increments
    counts = [sum(tile.num_tokens for tile in picture) for picture in pictures]
    increments = increments_of(
        config, len(ids) - len(counts), counts, request.sampling.max_tokens, given
    )
    expanded = expand(
        ids,
        np.zeros(len(ids), dtype=np.bool_),
        np.zeros(len(ids), dtype=np.int64),
        (NO_PARENT,),
        image_token_id=config.image_token_id,
        tokens_per_image=counts,
        increments=increments,
        ceil_after_image=config.ceil_after_image,
        source=source,
    )
    if config.ceil_after_image and expanded.is_visual[-1]:
        raise RequestError(
            f"{source} ends within a picture, and positions are rounded up after one; close it "
            f"with </img>"
        )
    tiles, spans = _placed(pictures, np.flatnonzero(expanded.is_visual))
    return Prompt(PromptTokens(expanded.input_ids, expanded.position_ids, spans), tiles, increments)


@dataclass(frozen=True, slots=True, eq=False)
class _Unplaced:
    """A tile that has no place yet."""

    key: bytes
    num_tokens: int
    pixels: UInt8[np.ndarray, "px px 3"] | None = None
    features: Float[Tensor, "visual_tokens hidden"] | None = None


def _of_example(
    example: Example, config: CascadeVLConfig
) -> tuple[Int[np.ndarray, " slots"], list[list[_Unplaced]], Increments | None]:
    if example.parents != (NO_PARENT,):
        raise RequestError(
            f"{example.source} has {len(example.parents)} segments; only a conversation without "
            f"branches can be answered"
        )
    ends = np.cumsum(example.tiles_per_image).tolist()
    pictures = [
        _cut(example.tiles[end - count : end], config)
        for end, count in zip(ends, example.tiles_per_image, strict=True)
    ]
    return example.input_ids, pictures, example.increments or None


def _of_parts(
    parts: Sequence[PromptPart], config: CascadeVLConfig
) -> tuple[Int[np.ndarray, " slots"], list[list[_Unplaced]], None]:
    ids: list[int] = []
    pictures: list[list[_Unplaced]] = []
    for part in parts:
        if isinstance(part, TextIds):
            _check_ids(part.ids, config)
            ids += part.ids
            continue
        ids.append(config.image_token_id)
        if isinstance(part, ImageFeatures):
            pictures.append(_encoded(part, config))
        else:
            pictures.append(_cut(part.tiles, config))
    if not ids:
        raise RequestError("the prompt has no tokens; an answer needs at least one before it")
    return np.asarray(ids, dtype=np.int64), pictures, None


def _check_ids(ids: Sequence[int], config: CascadeVLConfig) -> None:
    vocab_size = config.text_config.vocab_size
    wrong = [number for number in ids if not 0 <= number < vocab_size]
    if wrong:
        raise RequestError(f"token {wrong[0]} is not one of the model's {vocab_size} tokens")
    if config.image_token_id in ids:
        raise RequestError(
            f"the text holds the image-context token {config.image_token_id}; give every picture "
            f"as a part of its own"
        )


def _cut(tiles: UInt8[np.ndarray, "tiles px px 3"], config: CascadeVLConfig) -> list[_Unplaced]:
    """The tiles of a picture that the model encodes."""
    size = config.vision_config.image_size
    wanted = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(tiles) == 0 or tiles.shape[1:3] != wanted:
        raise RequestError(
            f"a picture has {len(tiles)} tiles of {tiles.shape[1]} x {tiles.shape[2]} pixels; the "
            f"model takes at least one, of {wanted[0]} x {wanted[1]}"
        )
    number = config.tokens_per_tile
    return [_Unplaced(_fingerprint(tile), number, pixels=tile) for tile in tiles]


def _encoded(picture: ImageFeatures, config: CascadeVLConfig) -> list[_Unplaced]:
    """The tiles of a picture whose visual tokens are there."""
    width = config.text_config.hidden_size
    tiles = [tile for group in picture.groups for tile in _tiles(group, width)]
    if not tiles:
        raise RequestError("a picture has no visual tokens; give the features of at least one tile")
    return tiles


def _tiles(features: VisualFeatures, width: int) -> list[_Unplaced]:
    _, number, hidden = features.projected.shape
    if hidden != width or number == 0:
        raise RequestError(
            f"features have {number} visual tokens a tile of width {hidden}; the model takes at "
            f"least one, of width {width}: they come from another model"
        )
    label = f"features {features.weight_version}".encode()
    return [
        _Unplaced(_fingerprint(_bytes_of(tile), label), number, features=tile)
        for tile in features.projected
    ]


def _bytes_of(values: Float[Tensor, "tokens hidden"]) -> UInt8[np.ndarray, "tokens bytes"]:
    found: np.ndarray = values.detach().cpu().contiguous().view(torch.uint8).numpy()
    return found


def _fingerprint(content: UInt8[np.ndarray, ...], label: bytes = b"tile") -> bytes:
    digest = hashlib.blake2b(label + f"{content.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(content).tobytes())
    return digest.digest()


def _placed(
    pictures: Sequence[Sequence[_Unplaced]], places: Int[np.ndarray, " visual"]
) -> tuple[tuple[Tile, ...], tuple[tuple[int, int, bytes], ...]]:
    """Tiles with their places, and first token, end and fingerprint of every picture."""
    tiles: list[Tile] = []
    spans: list[tuple[int, int, bytes]] = []
    done = 0
    for picture in pictures:
        first = int(places[done])
        start = first
        for tile in picture:
            stop = start + tile.num_tokens
            tiles.append(Tile(start, stop, tile.key, tile.pixels, tile.features))
            start = stop
        done += start - first
        contents = b"".join(tile.key for tile in picture)
        spans.append((first, start, hashlib.blake2b(contents, digest_size=16).digest()))
    return tuple(tiles), tuple(spans)
