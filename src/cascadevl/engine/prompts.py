"""From a request to a prompt: its tokens, where they sit, and what makes the visual ones.

The one place where a request is held against the model. How many visual tokens a tile gets may be
for the router to decide, which knows only once the tile is encoded. Until then a prompt is laid out
as long as it can become, so that a request which may not fit is refused when it comes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from cascadevl.engine.cache import PromptTokens
from cascadevl.engine.contents import Content, Picture, contents_of, cut
from cascadevl.engine.requests import Request
from cascadevl.errors import RequestError
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.routing import (
    VisualBudget,
    budget_for,
    compressed_tiles,
    most_tokens,
    settled,
    tokens_of,
)
from cascadevl.model.v2pe import Increments, increments_of
from cascadevl.sequence import expand, tokens_per_image
from cascadevl.types import NO_PARENT


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """One tile of a prompt.

    Attributes:
        start: Place of its first visual token.
        stop: Place behind its last one.
        content: What it shows.
    """

    start: int
    stop: int
    content: Content

    @property
    def num_tokens(self) -> int:
        """Its visual tokens."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, eq=False)
class Unrouted:
    """A request that waits for the router.

    Attributes:
        request: What is asked.
        config: Of the model that is asked.
        ids: Its tokens, one for each picture.
        pictures: Its pictures.
        increments: Position step of visual tokens that the request brings, if it does.
        budget: By which the router decides.
    """

    request: Request
    config: CascadeVLConfig
    ids: Int[np.ndarray, " slots"]
    pictures: Sequence[Picture]
    increments: Increments | None
    budget: VisualBudget

    @property
    def contents(self) -> list[Content]:
        """All tiles."""
        return [content for picture in self.pictures for content in picture]

    @property
    def undecided(self) -> list[Content]:
        """Tiles whose number of visual tokens is for the router to decide."""
        return [content for content in self.contents if content.num_tokens is None]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What a request asks, ready to be computed.

    Attributes:
        tokens: Its tokens and positions.
        tiles: Its tiles, in the order of their tokens.
        increments: Position step of each picture's visual tokens.
        num_compressed: Tiles with fewer visual tokens than a full one.
        unrouted: What the router is to decide first; the rest is then what it may become at most.
            None once it is decided.
    """

    tokens: PromptTokens
    tiles: tuple[Tile, ...]
    increments: tuple[float, ...]
    num_compressed: int = 0
    unrouted: Unrouted | None = None

    @property
    def tokens_per_tile(self) -> tuple[int, ...]:
        """Visual tokens of each tile."""
        return tuple(tile.num_tokens for tile in self.tiles)

    @property
    def num_visual(self) -> int:
        """Visual tokens among the tokens."""
        return sum(self.tokens_per_tile)


def prepare(request: Request, config: CascadeVLConfig) -> Prompt:
    """Put the visual tokens of a request in their places.

    Args:
        request: What is asked.
        config: Of the model that is asked.

    Returns:
        The prompt; with `Prompt.unrouted`, if its tiles must be encoded to know which of them
        are compressed (`routed`).

    Raises:
        RequestError: If the prompt and the tokens asked for do not fit the trained context, a
            part does not fit the model, increments are not as many as pictures, an example has
            branches, or a visual budget is given to a model without a router.
    """
    budget = budget_for(config, request.visual_budget)
    ids, pictures, increments = contents_of(request, config)
    asked = Unrouted(request, config, ids, pictures, increments, budget)
    number = len(asked.undecided)
    whole = settled(budget, number)
    counts = most_tokens(config, number, budget if whole is None else whole)
    return _laid_out(asked, counts, unrouted=asked if whole is None else None)


def routed(asked: Unrouted, probability: Float[Tensor, " tiles"]) -> Prompt:
    """The prompt that the router makes of a request.

    Args:
        asked: The request.
        probability: The router's, of compressing each of its undecided tiles.
    """
    counts = tokens_of(asked.config, compressed_tiles(probability, asked.budget))
    return _laid_out(asked, counts, unrouted=None)


def _laid_out(asked: Unrouted, counts: Sequence[int], *, unrouted: Unrouted | None) -> Prompt:
    """The prompt with so many visual tokens for each of its undecided tiles."""
    config, request = asked.config, asked.request
    decided = iter(counts)
    each = [next(decided) if c.num_tokens is None else c.num_tokens for c in asked.contents]
    images = tokens_per_image([len(picture) for picture in asked.pictures], each)
    text = len(asked.ids) - len(images)
    increments = increments_of(config, text, images, request.sampling.max_tokens, asked.increments)
    expanded = expand(
        asked.ids,
        np.zeros(len(asked.ids), dtype=np.bool_),
        np.zeros(len(asked.ids), dtype=np.int64),
        (NO_PARENT,),
        image_token_id=config.image_token_id,
        tokens_per_image=images,
        increments=increments,
        ceil_after_image=config.ceil_after_image,
        source=request.source,
    )
    if config.ceil_after_image and expanded.is_visual[-1]:
        raise RequestError(
            f"{request.source} ends within a picture, and positions are rounded up after one; "
            f"close it with </img>"
        )
    tiles, spans = _placed(asked.pictures, each, np.flatnonzero(expanded.is_visual))
    return Prompt(
        PromptTokens(expanded.input_ids, expanded.position_ids, spans),
        tiles,
        increments,
        num_compressed=sum(number < config.tokens_per_tile for number in each),
        unrouted=unrouted,
    )


def tiles_of(
    tiles: UInt8[np.ndarray, "tiles px px 3"], config: CascadeVLConfig
) -> tuple[Tile, ...]:
    """Tiles that stand in no prompt, all full, one behind the other.

    Args:
        tiles: RGB tiles.
        config: Of the model that encodes them.

    Raises:
        RequestError: If they do not have the model's size.
    """
    number = config.tokens_per_tile
    contents = cut(tiles, config, [None] * len(tiles))
    return tuple(
        Tile(place * number, (place + 1) * number, content)
        for place, content in enumerate(contents)
    )


def _placed(
    pictures: Sequence[Picture], counts: Sequence[int], places: Int[np.ndarray, " visual"]
) -> tuple[tuple[Tile, ...], tuple[tuple[int, int, bytes], ...]]:
    """Tiles with their places, and first token, end and fingerprint of every picture.

    The fingerprint tells full and compressed tiles apart: prompts of equal length differ in
    which tiles are which.
    """
    tiles: list[Tile] = []
    spans: list[tuple[int, int, bytes]] = []
    number = iter(counts)
    done = 0
    for picture in pictures:
        first = start = int(places[done])
        content = hashlib.blake2b(digest_size=16)
        for each in picture:
            stop = start + next(number)
            tiles.append(Tile(start, stop, each))
            content.update(each.key + (stop - start).to_bytes(8, "little"))
            start = stop
        done += start - first
        spans.append((first, start, content.digest()))
    return tuple(tiles), tuple(spans)
