"""Answering several prompts at once: one packed prefill, then one token a row and step.

The prompts of a batch are laid side by side in one row without padding, and prompts about the same
pictures share the tokens up to the last of them as one segment, so a picture is encoded once and
its visual tokens pass through the text body once. Afterwards every prompt gets a row of its own in
the cache, padded on the left. Rows that have ended leave the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from cascadevl.data.tiling import normalise
from cascadevl.errors import RequestError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.sampling import Sampling, next_tokens
from cascadevl.model.v2pe import Increments, increments_of
from cascadevl.sequence import Expanded, expand
from cascadevl.types import NO_PARENT, Example

_TILES_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """A prompt with its visual tokens in place.

    Attributes:
        number: Place among all prompts of the call; names its random stream.
        expanded: Its tokens and their positions.
        tiles: The tiles of each picture.
        tokens_per_image: Visual tokens of each picture.
        increments: Position step of each picture's visual tokens.
        pictures: A fingerprint of each picture's tiles.
        shared: Tokens up to the last visual one, which prompts about the same pictures may share.
    """

    number: int
    expanded: Expanded
    tiles: tuple[np.ndarray, ...]
    tokens_per_image: tuple[int, ...]
    increments: tuple[float, ...]
    pictures: tuple[bytes, ...]
    shared: int

    @property
    def num_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.expanded.input_ids)

    @property
    def beginning(self) -> tuple[tuple[bytes, ...], bytes, bytes]:
        """Equal for prompts that begin alike: pictures, tokens and positions."""
        expanded = self.expanded
        ids, positions = expanded.input_ids[: self.shared], expanded.position_ids[: self.shared]
        return self.pictures, ids.tobytes(), positions.tobytes()


def prepare(
    model: CascadeVLForConditionalGeneration,
    example: Example,
    number: int,
    max_new_tokens: int,
    increments: Increments | None,
) -> Prompt:
    """Expand a prompt with the increments it is to be read with.

    Args:
        model: Gives tokens a tile, image token and the rule of the increment.
        example: One conversation. Its own increments, if it brings any, are taken: so a training
            example is answered from the very positions it is trained with.
        number: Place among all prompts.
        max_new_tokens: Tokens that must fit behind it.
        increments: Instead of the example's and the configuration's: one for all pictures, or
            one for each.

    Raises:
        RequestError: If prompt and new tokens do not fit the trained context, the increments are
            not as many as pictures, or the example has branches.
    """
    if example.parents != (NO_PARENT,):
        raise RequestError(
            f"{example.source} has {len(example.parents)} segments; only a conversation without "
            f"branches can be answered"
        )
    tokens = tokens_per_image(model, example)
    chosen = increments_of(
        model.config,
        len(example.input_ids) - len(tokens),
        tokens,
        max_new_tokens,
        (example.increments or None) if increments is None else increments,
    )
    expanded = expand(
        example.input_ids,
        example.trained,
        np.zeros(len(example.input_ids), dtype=np.int64),
        (NO_PARENT,),
        image_token_id=model.config.image_token_id,
        tokens_per_image=tokens,
        increments=chosen,
        ceil_after_image=model.config.ceil_after_image,
        source=example.source,
    )
    places = np.flatnonzero(expanded.is_visual)
    each = np.split(example.tiles, np.cumsum(example.tiles_per_image)[:-1]) if tokens else ()
    return Prompt(
        number=number,
        expanded=expanded,
        tiles=tuple(each),
        tokens_per_image=tuple(tokens),
        increments=chosen,
        pictures=tuple(map(_fingerprint, each)),
        shared=int(places[-1]) + 1 if len(places) else 0,
    )


def tokens_per_image(model: CascadeVLForConditionalGeneration, example: Example) -> list[int]:
    """Visual tokens of each picture of an example."""
    return [tiles * model.tokens_per_tile for tiles in example.tiles_per_image]


def _fingerprint(tiles: np.ndarray) -> bytes:
    pixels = np.ascontiguousarray(tiles).tobytes()
    return hashlib.blake2b(pixels + f"{tiles.shape}".encode(), digest_size=16).digest()


@dataclass(slots=True, eq=False)
class Rows:
    """The prompts that are still being answered; everything has one entry a row.

    Attributes:
        numbers: Their places among all prompts.
        generators: Their random streams.
        logits: Of the next token.
        last_position: Where the last token sits; the next one sits 1 further on.
        mask: Which keys of the cache are real.
        cache: Keys and values of what was read and said, but for the token chosen last.
    """

    numbers: list[int]
    generators: list[torch.Generator | None]
    logits: Float[Tensor, "rows vocab"]
    last_position: Float[Tensor, " rows"]
    mask: Bool[Tensor, "rows keys"]
    cache: Cache

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        if len(rows) == len(self.numbers):
            return
        index = torch.tensor(rows, dtype=torch.int64, device=self.mask.device)
        self.numbers = [self.numbers[row] for row in rows]
        self.generators = [self.generators[row] for row in rows]
        self.logits, self.last_position = self.logits[index], self.last_position[index]
        self.mask = self.mask[index]
        self.cache.batch_select_indices(index)


class Decoder:
    """Answers batches of prompts with one model; remembers the pictures of the last batch."""

    def __init__(self, model: CascadeVLForConditionalGeneration, sampling: Sampling) -> None:
        """Bind the model and how to draw."""
        self.model, self.sampling = model, sampling
        self.features: dict[bytes, Tensor] = {}

    def tokens(self, prompts: Sequence[Prompt], ended: set[int]) -> Iterator[tuple[int, int]]:
        """Yield (number of the prompt, token) as the tokens come, until every prompt has ended.

        Args:
            prompts: The batch.
            ended: Numbers of prompts that want no more; the caller adds to it between tokens.
        """
        yield from self.follow(self.prefill(prompts), ended)

    def follow(self, rows: Rows, ended: set[int]) -> Iterator[tuple[int, int]]:
        """Yield (number of the prompt, token) from rows whose prompts are read.

        Args:
            rows: What is answered; changed as it goes on.
            ended: Numbers of prompts that want no more; the caller adds to it between tokens.
        """
        while True:
            chosen = self._choose(rows)
            yield from zip(list(rows.numbers), chosen.tolist(), strict=True)
            going = [row for row, number in enumerate(rows.numbers) if number not in ended]
            if not going:
                return
            chosen = chosen[torch.tensor(going, device=chosen.device)]
            rows.keep(going)
            self._step(rows, chosen)

    @torch.inference_mode()
    def _choose(self, rows: Rows) -> Int64[Tensor, " rows"]:
        return next_tokens(rows.logits, self.sampling, rows.generators)

    @torch.inference_mode()
    def _step(self, rows: Rows, tokens: Int64[Tensor, " rows"]) -> None:
        body = self.model.model
        rows.last_position = rows.last_position + 1
        rows.mask = torch.cat([rows.mask, torch.ones_like(rows.mask[:, :1])], dim=1)
        embeds = self.model.get_input_embeddings()(tokens[:, None])
        hidden = body.run_cached(embeds, rows.last_position[:, None], rows.mask, rows.cache)
        rows.logits = self.model.lm_head(hidden[:, -1])

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Prompt]) -> Rows:
        """Read prompts: packed into one row, and then a row for each."""
        device = self.model.device
        packed = _pack(prompts)
        body = self.model.model
        visual = self.visual([prompts[number] for number in packed.with_images])
        embeds = body.embed(
            torch.from_numpy(packed.input_ids)[None].to(device),
            torch.from_numpy(packed.visual_index).to(device),
            visual,
        )
        layout = body.layout(
            torch.from_numpy(packed.segments)[None].to(device),
            torch.from_numpy(packed.parents)[None].to(device),
        )
        positions = torch.from_numpy(packed.position_ids)[None].to(device)
        cache = DynamicCache()  # windows are kept by the masks: a packed row must not be cut
        hidden = body.run_text(embeds, positions, layout, cache)
        chains = [torch.from_numpy(chain).to(device) for chain in packed.chains]
        ends = torch.stack([chain[-1] for chain in chains])
        cache, mask = _rows_of_cache(cache, chains)
        numbers = [prompt.number for prompt in prompts]
        return Rows(
            numbers=numbers,
            generators=[self.sampling.generator(number, device) for number in numbers],
            logits=self.model.lm_head(hidden[0, ends]),
            last_position=positions[0, ends],
            mask=mask,
            cache=cache,
        )

    def visual(
        self, prompts: Sequence[Prompt]
    ) -> Float[Tensor, "tiles visual_tokens hidden"] | None:
        """Visual tokens of the prompts' pictures, one after the other; each picture made once."""
        wanted: dict[bytes, np.ndarray] = {}
        for prompt in prompts:
            wanted |= zip(prompt.pictures, prompt.tiles, strict=True)
        self.features = {key: self.features[key] for key in wanted if key in self.features}
        new = {key: tiles for key, tiles in wanted.items() if key not in self.features}
        if new:
            tiles = np.concatenate(list(new.values()))
            made = [
                self.model.encode_images(
                    normalise(tiles[start : start + _TILES_AT_ONCE]).to(self.model.device)
                ).projected
                for start in range(0, len(tiles), _TILES_AT_ONCE)
            ]
            counts = [len(each) for each in new.values()]
            self.features |= dict(zip(new, torch.cat(made).split(counts), strict=True))
        if not wanted:
            return None
        return torch.cat([self.features[key] for prompt in prompts for key in prompt.pictures])


@dataclass(frozen=True, slots=True, eq=False)
class _Packed:
    """Prompts in one row; ``chains`` holds every prompt's tokens, those it shares first."""

    input_ids: Int64[np.ndarray, " tokens"]
    position_ids: Float[np.ndarray, " tokens"]
    segments: Int64[np.ndarray, " tokens"]
    parents: Int64[np.ndarray, " tokens"]
    visual_index: Int64[np.ndarray, " visual"]
    with_images: list[int]  # the prompts whose pictures stand in the row, in order
    chains: list[Int64[np.ndarray, " _"]]


def _pack(prompts: Sequence[Prompt]) -> _Packed:
    alike: dict[object, list[int]] = {}
    for number, prompt in enumerate(prompts):
        # A prompt without pictures stands alone: what others share with it is a few words.
        alike.setdefault(prompt.beginning if prompt.shared else number, []).append(number)
    pieces: list[tuple[Expanded, slice, int]] = []  # tokens of one segment, and its parent
    chains: dict[int, Int64[np.ndarray, " _"]] = {}
    with_images: list[int] = []
    length = 0
    for members in alike.values():
        shared = prompts[members[0]].shared if len(members) > 1 else 0
        beginning = np.arange(length, length + shared)
        parent = len(pieces) if shared else NO_PARENT
        if shared:
            pieces.append((prompts[members[0]].expanded, slice(0, shared), NO_PARENT))
            length += shared
        if prompts[members[0]].shared:
            with_images.append(members[0])
        for number in members:
            rest = prompts[number].num_tokens - shared
            pieces.append((prompts[number].expanded, slice(shared, None), parent))
            chains[number] = np.concatenate([beginning, np.arange(length, length + rest)])
            length += rest
    counts = [len(expanded.input_ids[part]) for expanded, part, _ in pieces]
    is_visual = np.concatenate([expanded.is_visual[part] for expanded, part, _ in pieces])
    return _Packed(
        input_ids=np.concatenate([expanded.input_ids[part] for expanded, part, _ in pieces]),
        position_ids=np.concatenate([expanded.position_ids[part] for expanded, part, _ in pieces]),
        segments=np.repeat(np.arange(len(pieces)), counts),
        parents=np.repeat([parent for _, _, parent in pieces], counts),
        visual_index=np.flatnonzero(is_visual),
        with_images=with_images,
        chains=[chains[number] for number in range(len(prompts))],
    )


def _rows_of_cache(
    cache: DynamicCache, chains: Sequence[Tensor]
) -> tuple[DynamicCache, Bool[Tensor, "rows keys"]]:
    """Give every prompt a row of its own, padded on the left, from the cache of the packed row."""
    longest = max(len(chain) for chain in chains)
    index = torch.stack([torch.nn.functional.pad(c, (longest - len(c), 0)) for c in chains])
    mask = torch.stack([torch.arange(longest, device=c.device) >= longest - len(c) for c in chains])

    def rows(states: Tensor) -> Tensor:
        taken = states[0].index_select(1, index.flatten())  # (heads, rows * keys, dim)
        shaped = taken.view(len(taken), *index.shape, -1)
        return shaped.transpose(0, 1).contiguous()

    full: Any = cache.layers  # all of them keep every key, because no configuration was given
    layers = [(rows(layer.keys), rows(layer.values)) for layer in full]
    return DynamicCache(ddp_cache_data=layers), mask
