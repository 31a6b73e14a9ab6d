"""Random tiles, and what the Flash checkpoints of `tests.model.make_flash` make of them."""

from __future__ import annotations

from typing import Any

import torch
from tests.model import make_checkpoints as make
from tests.model import make_flash
from torch import Tensor

from cascadevl.model.modeling import CascadeVLForConditionalGeneration

NUM_TILES = 7
FULL, SMALL = make.TOKENS_PER_TILE, 1
TENSORS = {
    name: tensor.double().tolist()
    for name, tensor in make_flash.tensors_of().items()
    if name.startswith(("mlp", "pooling", "gating"))
}


def pixels(number: int = NUM_TILES, seed: int = 0) -> Tensor:
    """So many normalised tiles."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 3, make.TILE_PX, make.TILE_PX, generator=generator) * 2


@torch.no_grad()
def patches_of(model: CascadeVLForConditionalGeneration, tiles: Tensor) -> list[Any]:
    """Their patch features."""
    patches = model.encode_images(tiles).patches
    assert patches is not None
    return patches.double().tolist()


@torch.no_grad()
def chances_of(model: CascadeVLForConditionalGeneration, tiles: Tensor) -> list[float]:
    """The router's probability of compressing each."""
    chances = model.encode_images(tiles).compress
    assert chances is not None
    return chances.tolist()
