"""Masks: of prompts that came without one, and of tokens that follow those in a key-value cache.

transformers would make such masks itself, but from the positions where it finds no mask, and with
fractional positions it takes every visual token for the start of a packed sample.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from cascadevl.types import PADDING_SEGMENT


def is_empty(past_key_values: Cache) -> bool:
    """Whether a cache holds nothing yet, and hands new keys back as they are when it gets them."""
    if int(past_key_values.get_seq_length()) != 0:
        return False
    return past_key_values.get_mask_sizes(1, 0)[0] == 1  # a preallocated cache returns all its keys


def row_segments(
    rows: int,
    width: int,
    attention_mask: Int[Tensor, "rows tokens"] | Bool[Tensor, "rows tokens"] | None,
    device: torch.device,
) -> Int64[Tensor, "rows tokens"]:
    """Segments of padded rows that hold one sample each.

    Raises:
        ValueError: If the mask is not as wide as the rows.
    """
    segments = torch.zeros(rows, width, dtype=torch.int64, device=device)
    if attention_mask is None:
        return segments
    if tuple(attention_mask.shape) != (rows, width):
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)} for {rows} rows of {width} tokens; "
            f"give one entry a token (2D), nothing more is supported"
        )
    return segments.masked_fill(attention_mask == 0, PADDING_SEGMENT)


def cached_masks(
    attention_mask: Bool[Tensor, "rows keys"],
    num_queries: int,
    past_key_values: Cache,
    text_config: Any,
) -> Bool[Tensor, "rows 1 queries layer_keys"] | dict[str, Tensor]:
    """Which key each new token sees, for the kinds of layers the text body has.

    Windows count the tokens between, padding inside a row excluded.

    Args:
        attention_mask: Where a key is real: those in the cache, then the new ones.
        num_queries: New tokens of every row.
        past_key_values: The cache before it is extended.
        text_config: Configuration of the text body.

    Returns:
        One mask, or, where layers of different kinds alternate, one for each name of a kind.

    Raises:
        ValueError: If the mask does not cover the cache and the new tokens.
    """
    num_keys = int(past_key_values.get_seq_length()) + num_queries
    if attention_mask.shape[1] != num_keys:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens but the cache and the new "
            f"tokens are {num_keys}; give one entry for each of them"
        )
    window = getattr(text_config, "sliding_window", None)
    kinds: list[str] = list(getattr(text_config, "layer_types", None) or ["only"])
    masks = {}
    for kind in dict.fromkeys(kinds):
        length, offset = past_key_values.get_mask_sizes(num_queries, kinds.index(kind))
        visible = _visible(
            attention_mask, num_queries, None if kind == "full_attention" else window
        )[:, :, offset : offset + length]
        spare = length - visible.shape[2]  # of a preallocated cache
        masks[kind] = torch.nn.functional.pad(visible, (0, spare)).unsqueeze(1)
    return masks if len(masks) > 1 else masks[kinds[0]]


def _visible(
    real: Bool[Tensor, "rows keys"], num_queries: int, window: int | None
) -> Bool[Tensor, "rows queries keys"]:
    place = torch.arange(real.shape[1], device=real.device)
    visible = real[:, None] & (place <= place[-num_queries:, None])
    if window is None:
        return visible
    count = real.cumsum(1)  # tokens up to and including each key
    return visible & (count[:, -num_queries:, None] - count[:, None] < window)


def inferred_mask(
    input_ids: Tensor, config: GenerationConfig, kwargs: dict[str, Any]
) -> Int64[Tensor, "rows tokens"]:
    """Which tokens are real where the caller did not say: transformers' rule.

    Padding is taken for padding only if its token does not end a sequence too.
    """
    pad = kwargs.get("pad_token_id", config.pad_token_id)
    ends = kwargs.get("eos_token_id", config.eos_token_id)
    ends = ends if isinstance(ends, list) else [ends]
    if pad is None or pad in ends:
        return torch.ones_like(input_ids)
    real: Tensor = input_ids != pad
    return real.long()
