"""The visual resolution router: which tiles can do with fewer visual tokens.

InternVL3.5 report, section on the visual resolution router (ViR): a binary classifier over a tile.
The report says no more of it; the layers are those of the released weights. One learned query
gathers a tile's patch features in four layers of cross-attention, four residual blocks and a gate
make two numbers of it, and their softmax says how probable it is that the tile loses nothing when
it is compressed. What is done with that is in `cascadevl.model.routing`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.projector import DROPOUT

NUM_LAYERS = 4

_RELEASED_ORDER = (0, 1, 1, 1)
"""Layers that released weights run through: the last two are stored, but never used."""


class PoolingLayer(nn.Module):
    """Attention of one query to the patch features of its tile, and a LayerNorm.

    As there is one query, no patch needs to be projected: the query is projected back through the
    weights of the keys, patches are averaged as they are, and the average is projected through the
    weights of the values. The bias of the keys adds the same to all scores and drops out. That is
    the same attention in about ``2 heads / width`` of the operations.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        """Build the layer; queries, keys and values stand in one weight, as released.

        Args:
            width: Channels of the patch features.
            num_heads: Heads; they divide the width.
        """
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(
        self, query: Float[Tensor, "#tiles width"], patches: Float[Tensor, "tiles patches width"]
    ) -> Float[Tensor, "tiles width"]:
        """What the query finds in each tile.

        Args:
            query: One for all tiles, or one for each.
            patches: Their patch features.
        """
        heads, width = self.num_heads, patches.shape[-1]
        dim = width // heads
        to_query, to_key, to_value = self.in_proj_weight.chunk(3)
        query_bias, _, value_bias = self.in_proj_bias.chunk(3)
        asked = functional.linear(query, to_query, query_bias).view(-1, heads, dim) * dim**-0.5
        folded = torch.einsum("thd,hdc->thc", asked, to_key.view(heads, dim, width))
        scores = folded @ patches.mT  # (tiles, heads, patches)
        exact = torch.promote_types(scores.dtype, torch.float32)  # bfloat16 would lose the tail
        weights = scores.softmax(-1, dtype=exact).to(patches.dtype)
        pooled = weights @ patches  # (tiles, heads, width)
        values = torch.einsum("thc,hdc->thd", pooled, to_value.view(heads, dim, width))
        found: Tensor = self.norm(self.out_proj(values.flatten(1) + value_bias))
        return found


class GateBlock(nn.Module):
    """A residual block of two linear layers, normalised before it is added."""

    def __init__(self, width: int) -> None:
        """Build the layers.

        Args:
            width: Channels; four times as many within.
        """
        super().__init__()
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, states: Float[Tensor, "tiles width"]) -> Float[Tensor, "tiles width"]:
        """One block on."""
        inner = self.dropout(functional.gelu(self.linear_1(states)))
        added: Tensor = self.norm(self.dropout(self.linear_2(inner)))
        return states + added


class Router(nn.Module):
    """From a tile's patch features to the probability of compressing it."""

    def __init__(self, config: CascadeVLConfig) -> None:
        """Build the layers, all of them, also where the configuration leaves some unused."""
        super().__init__()
        width = config.vision_config.hidden_size
        is_released = config.flash_layers == "released"
        self.order: Sequence[int] = _RELEASED_ORDER if is_released else range(NUM_LAYERS)
        self.query = nn.Parameter(torch.randn(1, width))
        self.pooling = nn.ModuleList(
            PoolingLayer(width, config.flash_heads) for _ in range(NUM_LAYERS)
        )
        self.blocks = nn.ModuleList(GateBlock(width) for _ in range(NUM_LAYERS))
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, 2)

    def logits(self, patches: Float[Tensor, "tiles patches width"]) -> Float[Tensor, "tiles 2"]:
        """The gate of each tile before the softmax: to compress it, to keep it.

        Args:
            patches: Patch features without the class token, before any pixel shuffle.
        """
        states: Tensor = self.query
        for number in self.order:
            states = self.pooling[number](states, patches)
        for block in self.blocks:
            states = block(states)
        gate: Tensor = self.gate(self.norm(states))
        return gate

    def forward(self, patches: Float[Tensor, "tiles patches width"]) -> Float[Tensor, " tiles"]:
        """Probability of compressing each tile.

        Args:
            patches: Patch features without the class token, before any pixel shuffle.
        """
        return self.logits(patches).softmax(-1)[:, 0]
