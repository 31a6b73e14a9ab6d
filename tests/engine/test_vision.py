"""Encoding of tiles for the engine: in parts that suit a CPU's cache, each tile once."""

from __future__ import annotations

import numpy as np
import torch
from tests.model.bodies import body_model
from torch import Tensor, nn

from cascadevl.data.tiling import normalise
from cascadevl.engine.vision import tile_encoder

MOST_PATCHES = 2048


def test_many_tiles_are_encoded_in_parts_that_give_what_the_whole_gives():
    model = body_model("qwen2")
    px, patches = model.config.tile_px, model.config.patches_per_tile
    number = 2 * MOST_PATCHES // patches + 3
    tiles = np.random.default_rng(0).integers(0, 256, (number, px, px, 3), dtype=np.uint8)
    sizes: list[int] = []

    def note(module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        sizes.append(len(output))

    handle = model.model.multi_modal_projector.register_forward_hook(note)
    encode = tile_encoder(model)
    found = encode(tiles)
    assert sum(sizes) == number
    assert len(sizes) == 3
    assert max(sizes) * patches <= MOST_PATCHES
    encode(tiles)
    assert len(sizes) == 3, "what is known is not encoded again"
    handle.remove()
    with torch.no_grad():
        whole = model.encode_images(normalise(tiles)).projected
    assert whole is not None
    torch.testing.assert_close(found, whole.flatten(0, 1), rtol=1e-5, atol=1e-5)
