"""Padded prompts whose tiles are routed: fewer places for visual tokens, and the way back.

Prompts come from a processor with places for full tiles, because it does not know what the router
will say. Each row is a request of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cascadevl.errors import RequestError
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.routing import VisualBudget, compressed_tiles, tokens_of


def routes_of_rows(
    config: CascadeVLConfig,
    input_ids: Int64[Tensor, "rows tokens"],
    probability: Float[Tensor, " tiles"],
    budget: VisualBudget,
) -> tuple[int, ...]:
    """Visual tokens of each tile, every row routed for itself.

    Args:
        config: The model's.
        input_ids: Prompts with places for full tiles.
        probability: The router's, of compressing each tile, row after row.
        budget: Of each row.

    Raises:
        RequestError: If the places are not those of so many full tiles.
    """
    places = (input_ids == config.image_token_id).sum(1).tolist()
    tiles = [number // config.tokens_per_tile for number in places]
    if sum(tiles) != len(probability) or any(n % config.tokens_per_tile for n in places):
        raise RequestError(
            f"the prompts have {places} places for visual tokens and come with {len(probability)} "
            f"tiles of {config.tokens_per_tile}; expand them for full tiles, and leave the rest to "
            f"the router"
        )
    rows = probability.split(tiles)
    return tuple(n for row in rows for n in tokens_of(config, compressed_tiles(row, budget)))


def shortened(
    config: CascadeVLConfig,
    input_ids: Int64[Tensor, "rows tokens"],
    attention_mask: Tensor,
    tokens_per_tile: Sequence[int],
) -> tuple[Int64[Tensor, "rows fewer"], Int64[Tensor, "rows fewer"]]:
    """Prompts without the places that compressed tiles leave empty, padded on the left.

    Args:
        config: The model's.
        input_ids: Prompts with places for full tiles.
        attention_mask: Nonzero where a token is real.
        tokens_per_tile: Visual tokens of each tile.

    Returns:
        Token ids, and 1 where one is real.
    """
    kept = attention_mask != 0
    place = (input_ids == config.image_token_id).flatten().nonzero().squeeze(1)
    within = torch.arange(config.tokens_per_tile, device=place.device)
    counts = torch.tensor(tokens_per_tile, dtype=torch.int64, device=place.device)
    kept.view(-1)[place] = (within < counts[:, None]).flatten()
    lengths = kept.sum(1)
    width = int(lengths.max())
    is_real = torch.arange(width, device=place.device) >= width - lengths[:, None]
    pad = config.text_config.pad_token_id
    ids = torch.full_like(is_real, 0 if pad is None else pad, dtype=torch.int64)
    ids[is_real] = input_ids[kept]
    return ids, is_real.long()


def with_prompts(made: Any, input_ids: Int64[Tensor, "rows tokens"], width: int) -> Any:
    """What `generate` made of shortened prompts, behind the prompts as they came.

    Args:
        made: Sequences, or an output that has them.
        input_ids: The prompts as they came.
        width: Length of the shortened ones.
    """
    if not isinstance(made, Tensor):
        made.sequences = with_prompts(made.sequences, input_ids, width)
        return made
    whole = input_ids.repeat_interleave(len(made) // len(input_ids), dim=0)
    return torch.cat([whole, made[:, width:]], dim=1)
