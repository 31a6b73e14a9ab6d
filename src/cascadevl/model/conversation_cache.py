"""What one conversation has read and said, kept so that a next turn computes only what is new.

A cached key holds its token's position, so it can be used again only where the token, its position
and, for a visual token, its picture are the same. Whoever asks decides the increments; when they
change, positions change, and everything is read again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.cache_utils import DynamicCache

from cascadevl.model.decoding import Decoder, Prompt, Rows

_PIECE_TOKENS = 512
"""Tokens read at once behind a cache; bounds the memory of their scores."""

_MIN_KNOWN = 0.25
"""Where less of a prompt is known, all is read: packed attention is faster than masked."""


class ConversationCache:
    """Keys and values of one conversation, and which tokens they belong to."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.prompt: Prompt | None = None
        self.said: list[int] = []
        self.cache: DynamicCache | None = None

    def read(self, prompt: Prompt, decoder: Decoder) -> Rows:
        """Read a prompt, computing only what was not read or said before.

        Args:
            prompt: The whole conversation, one prompt.
            decoder: Of the same model at every call.

        Returns:
            One row, ready to be answered. Tell `add` what it answers.
        """
        known = self.num_known(prompt)
        if known < _MIN_KNOWN * prompt.num_tokens:
            known = 0
        with torch.inference_mode():
            kept = None if self.cache is None else _cut(self.cache, known)
        self.prompt, self.said, self.cache = prompt, [], kept
        if kept is None:
            rows = decoder.prefill([prompt])
            assert isinstance(rows.cache, DynamicCache)
            self.cache = rows.cache
            return rows
        return self._read_on(prompt, decoder, kept, known)

    def add(self, token: int) -> None:
        """Note a token of the answer."""
        self.said.append(token)

    def num_known(self, prompt: Prompt) -> int:
        """Leading tokens of a prompt whose keys are there; never all of them.

        The last one is always computed, because its logits are wanted.
        """
        if self.prompt is None or self.cache is None:
            return 0
        last = np.float32(self.prompt.expanded.position_ids[-1])
        after = last + np.arange(1, len(self.said) + 1, dtype=np.float32)
        said = np.asarray(self.said, dtype=np.int64)
        ids = np.concatenate([self.prompt.expanded.input_ids, said])
        positions = np.concatenate([self.prompt.expanded.position_ids, after])
        new = prompt.expanded
        # A forward pass that was interrupted leaves some layers a few tokens ahead of others.
        filled = min(_num_keys(layer) for layer in self.cache.layers)
        length = min(len(ids), len(new.input_ids) - 1, filled)
        same = new.input_ids[:length] == ids[:length]
        same &= new.position_ids[:length] == positions[:length]
        length = _num_leading(same)
        pairs = zip(self.prompt.pictures, prompt.pictures, strict=False)
        equal = _num_leading(np.array([one == other for one, other in pairs], dtype=np.bool_))
        num_visual = sum(prompt.tokens_per_image[:equal])
        places = np.flatnonzero(new.is_visual)
        return length if num_visual == len(places) else min(length, int(places[num_visual]))

    @torch.inference_mode()
    def _read_on(self, prompt: Prompt, decoder: Decoder, cache: DynamicCache, known: int) -> Rows:
        """Compute the rest of a prompt behind what is known."""
        model = decoder.model
        device = model.device
        embeds = _embedded(prompt, decoder, known)
        positions = torch.from_numpy(prompt.expanded.position_ids)[None].to(device)
        mask = torch.ones(1, prompt.num_tokens, dtype=torch.bool, device=device)
        hidden: Tensor | None = None
        for start in range(known, prompt.num_tokens, _PIECE_TOKENS):
            stop = min(start + _PIECE_TOKENS, prompt.num_tokens)
            hidden = model.model.run_cached(
                embeds[:, start - known : stop - known],
                positions[:, start:stop],
                mask[:, :stop],
                cache,
            )
        assert hidden is not None, "the last token is never known"
        return Rows(
            numbers=[prompt.number],
            generators=[decoder.sampling.generator(prompt.number, device)],
            logits=model.lm_head(hidden[:, -1]),
            last_position=positions[:, -1],
            mask=mask,
            cache=cache,
        )


def _embedded(prompt: Prompt, decoder: Decoder, known: int) -> Float[Tensor, "1 new_tokens hidden"]:
    """Embeddings of the tokens that are not known yet, visual ones in their places."""
    model = decoder.model
    ids = torch.from_numpy(prompt.expanded.input_ids[known:])[None].to(model.device)
    place = torch.from_numpy(np.flatnonzero(prompt.expanded.is_visual[known:])).to(model.device)
    visual = decoder.visual([prompt]) if len(place) else None
    if visual is not None:
        visual = visual.flatten(0, 1)[-len(place) :][None]  # the last ones are those not known
    embeds: Tensor = model.model.embed(ids, place, visual)
    return embeds


def _num_leading(same: Bool[np.ndarray, " _"]) -> int:
    """How many leading entries are true."""
    return len(same) if same.all() else int(same.argmin())


def _num_keys(layer: Any) -> int:
    return 0 if layer.keys is None else int(layer.keys.shape[-2])


def _cut(cache: DynamicCache, length: int) -> DynamicCache | None:
    """The first tokens of a cache, copied, so that those behind them can be freed."""
    if length == 0:
        return None
    layers: Any = cache.layers  # all of them keep every key, because no configuration was given
    parts = [(layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in layers]
    return DynamicCache(ddp_cache_data=[(keys.clone(), values.clone()) for keys, values in parts])
