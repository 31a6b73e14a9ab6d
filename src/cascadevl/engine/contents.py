"""The tokens and tiles of a request as they came, held against the model.

What is equal is found to be equal here: every tile has a key that depends on its contents alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from cascadevl.engine.requests import ImageFeatures, PromptPart, Request, TextIds
from cascadevl.errors import RequestError
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.v2pe import Increments
from cascadevl.types import NO_PARENT, Example, VisualFeatures


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """What a tile shows: pixels, patch features, or visual tokens that are made already.

    Attributes:
        key: Equal only for equal contents.
        num_tokens: Visual tokens it is to have; None if that depends on the budget.
        pixels: What it looks like, if it is to be encoded.
        patches: Its patch features, if they came with the request.
        compress: With them, the router's probability of compressing it.
        features: Its visual tokens, if they came with the request.
    """

    key: bytes
    num_tokens: int | None = None
    pixels: UInt8[np.ndarray, "px px 3"] | None = None
    patches: Float[Tensor, "patches channels"] | None = None
    compress: Float[Tensor, ""] | None = None
    features: Float[Tensor, "visual_tokens hidden"] | None = None


Picture: TypeAlias = Sequence[Content]
"""The tiles of one picture."""


def contents_of(
    request: Request, config: CascadeVLConfig
) -> tuple[Int[np.ndarray, " slots"], list[Picture], Increments | None]:
    """Tokens with one slot for each picture, the pictures, and the increments that are given.

    Args:
        request: What is asked.
        config: Of the model that is asked.

    Raises:
        RequestError: If a part does not fit the model, or an example has branches.
    """
    given = request.increments
    if isinstance(request.prompt, Example):
        ids, pictures = _of_example(request.prompt, request, config)
        own = request.prompt.increments or None
        return ids, pictures, own if given is None else given
    ids, pictures = _of_parts(request.prompt, config)
    return ids, pictures, given


def _of_example(
    example: Example, request: Request, config: CascadeVLConfig
) -> tuple[Int[np.ndarray, " slots"], list[Picture]]:
    if example.parents != (NO_PARENT,):
        raise RequestError(
            f"{example.source} has {len(example.parents)} segments; only a conversation without "
            f"branches can be answered"
        )
    # An example that was trained compressed is asked as it was trained, unless a budget is given.
    drawn = example.tokens_per_tile if request.visual_budget is None else ()
    counts: Sequence[int | None] = drawn or [None] * example.num_tiles
    ends = np.cumsum(example.tiles_per_image).tolist()
    pictures = [
        cut(example.tiles[end - count : end], config, counts[end - count : end])
        for end, count in zip(ends, example.tiles_per_image, strict=True)
    ]
    return example.input_ids, pictures


def _of_parts(
    parts: Sequence[PromptPart], config: CascadeVLConfig
) -> tuple[Int[np.ndarray, " slots"], list[Picture]]:
    ids: list[int] = []
    pictures: list[Picture] = []
    for part in parts:
        if isinstance(part, TextIds):
            _check_ids(part.ids, config)
            ids += part.ids
            continue
        ids.append(config.image_token_id)
        if isinstance(part, ImageFeatures):
            pictures.append(_encoded(part, config))
        else:
            pictures.append(cut(part.tiles, config, [None] * len(part.tiles)))
    if not ids:
        raise RequestError("the prompt has no tokens; an answer needs at least one before it")
    return np.asarray(ids, dtype=np.int64), pictures


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


def cut(
    tiles: UInt8[np.ndarray, "tiles px px 3"],
    config: CascadeVLConfig,
    counts: Sequence[int | None],
) -> Picture:
    """The tiles of a picture that the model encodes.

    Args:
        tiles: The tiles.
        config: Of the model.
        counts: Visual tokens that each is to have; None where that depends on the budget.

    Raises:
        RequestError: If the model cannot make that of them.
    """
    size = config.vision_config.image_size
    wanted = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(tiles) == 0 or tiles.shape[1:3] != wanted:
        raise RequestError(
            f"a picture has {len(tiles)} tiles of {tiles.shape[1]} x {tiles.shape[2]} pixels; the "
            f"model takes at least one, of {wanted[0]} x {wanted[1]}"
        )
    sizes = {
        config.tokens_per_tile,
        None,
        *([config.compressed_tokens] if config.flash_mode else []),
    }
    if not set(counts) <= sizes:
        raise RequestError(
            f"tiles are to have {sorted(set(counts) - sizes, key=str)} visual tokens, which this "
            f"model cannot make; the example was made for another one"
        )
    return [
        Content(_fingerprint(tile), number, pixels=tile)
        for tile, number in zip(tiles, counts, strict=True)
    ]


def _encoded(picture: ImageFeatures, config: CascadeVLConfig) -> Picture:
    """The tiles of a picture that were encoded elsewhere."""
    tiles = [tile for group in picture.groups for tile in _given(group, config)]
    if not tiles:
        raise RequestError("a picture has no visual tokens; give the features of at least one tile")
    return tiles


def _given(features: VisualFeatures, config: CascadeVLConfig) -> list[Content]:
    label = f"features {features.weight_version}".encode()
    if features.projected is None:
        return _patches(features, config, label)
    width = config.text_config.hidden_size
    _, number, hidden = features.projected.shape
    if hidden != width or number == 0:
        raise RequestError(
            f"features have {number} visual tokens a tile of width {hidden}; the model takes at "
            f"least one, of width {width}: they come from another model"
        )
    return [
        Content(_fingerprint(_bytes_of(tile), label), number, features=tile)
        for tile in features.projected
    ]


def _patches(features: VisualFeatures, config: CascadeVLConfig, label: bytes) -> list[Content]:
    """Tiles of which any route can be made."""
    assert features.patches is not None, "features hold one of the two"
    side = config.tile_px // int(config.vision_config.patch_size[0])
    wanted = (side**2, config.vision_config.hidden_size)
    if features.patches.shape[1:] != wanted or (config.flash_mode and features.compress is None):
        raise RequestError(
            f"patch features are {tuple(features.patches.shape[1:])} a tile, with"
            f"{'out' if features.compress is None else ''} the router's probabilities; the model "
            f"has {wanted}, and a router needs its probabilities: they come from another model"
        )
    chances: Sequence[Tensor | None] = [None] * features.num_tiles
    if features.compress is not None:
        chances = features.compress.unbind()
    return [
        Content(_fingerprint(_bytes_of(tile), label), patches=tile, compress=chance)
        for tile, chance in zip(features.patches, chances, strict=True)
    ]


def _bytes_of(values: Float[Tensor, "tokens hidden"]) -> UInt8[np.ndarray, "tokens bytes"]:
    found: np.ndarray = values.detach().cpu().contiguous().view(torch.uint8).numpy()
    return found


def _fingerprint(content: UInt8[np.ndarray, ...], label: bytes = b"tile") -> bytes:
    digest = hashlib.blake2b(label + f"{content.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(content).tobytes())
    return digest.digest()
