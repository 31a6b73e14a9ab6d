"""Small random Flash checkpoints in the format of the released ones, written out by hand.

What they hold beside a plain checkpoint (`tests.model.make_checkpoints`): the projector of
compressed tiles and the router.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.model import make_checkpoints as make
from tests.model.make_checkpoints import VIT_WIDTH, WIDTH, Shapes
from torch import Tensor

FLASH_KEYS = {
    "flash_mode": True,
    "flash_relative_threshold": 0.7,
    "flash_absolute_threshold": 0.4,
}


def flash_shapes() -> Shapes:
    """What the files of a Flash checkpoint hold beside those of a plain one."""
    width, joined = VIT_WIDTH, 16 * VIT_WIDTH
    for name, out, in_ in (
        ("mlp2.1", 2 * WIDTH, joined),
        ("mlp2.4", 2 * WIDTH, 2 * WIDTH),
        ("mlp2.7", WIDTH, 2 * WIDTH),
        ("gating.gate.1", 2, width),
    ):
        yield f"{name}.weight", (out, in_)
        yield f"{name}.bias", (out,)
    norms = {"mlp2.0": joined, "gating.gate.0": width}
    yield "pooling_before_gating.query_token", (1, width)
    for number in range(1, 5):
        norms[f"pooling_before_gating.norm{number}"] = norms[f"gating.block{number}.5"] = width
        start = f"pooling_before_gating.attn{number}"
        yield f"{start}.in_proj_weight", (3 * width, width)
        yield f"{start}.in_proj_bias", (3 * width,)
        yield f"{start}.out_proj.weight", (width, width)
        yield f"{start}.out_proj.bias", (width,)
        for layer, out, in_ in ((0, 4 * width, width), (3, width, 4 * width)):
            yield f"gating.block{number}.{layer}.weight", (out, in_)
            yield f"gating.block{number}.{layer}.bias", (out,)
    for name, size in norms.items():
        yield f"{name}.weight", (size,)
        yield f"{name}.bias", (size,)


def flash_tensors(seed: int = 2) -> dict[str, Tensor]:
    """The tensors of a Flash checkpoint's second projector and router in the GitHub format.

    Large enough for tiles to differ in what the router thinks of them.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(flash_shapes())
    return {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}


def tensors_of(family: str = "qwen3") -> dict[str, Tensor]:
    """All tensors of a Flash checkpoint in the GitHub format."""
    return make.github_tensors(family) | flash_tensors()


def write_flash(path: Path, family: str = "qwen3", **config: Any) -> Path:
    """Write a Flash checkpoint in the GitHub format, the only one they are released in."""
    tensors = tensors_of(family)
    return make.write(path, tensors, make.github_config(family, **FLASH_KEYS | config))


def hf_tensors(github: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under our names, those of the released -HF layout where it has some."""
    plain = {name: tensor for name, tensor in github.items() if not _flash_by_hand(name, tensor)}
    result = make.hf_tensors(plain)
    for name, tensor in github.items():
        result |= _flash_by_hand(name, tensor)
    return result


def _flash_by_hand(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if not name.startswith(("mlp2.", "pooling_before_gating.", "gating.")):
        return {}
    for old, new in (
        ("mlp2.0", "compressed_projector.layer_norm"),
        ("mlp2.1", "compressed_projector.linear_1"),
        ("mlp2.4", "compressed_projector.linear_2"),
        ("mlp2.7", "compressed_projector.linear_3"),
        ("pooling_before_gating.query_token", "router.query"),
        ("gating.gate.0", "router.norm"),
        ("gating.gate.1", "router.gate"),
    ):
        name = name.replace(old, new)
    for number in (1, 2, 3, 4):
        for old, new in (
            (f"pooling_before_gating.attn{number}", f"router.pooling.{number - 1}"),
            (f"pooling_before_gating.norm{number}", f"router.pooling.{number - 1}.norm"),
            (f"gating.block{number}.0", f"router.blocks.{number - 1}.linear_1"),
            (f"gating.block{number}.3", f"router.blocks.{number - 1}.linear_2"),
            (f"gating.block{number}.5", f"router.blocks.{number - 1}.norm"),
        ):
            name = name.replace(old, new)
    return {f"model.{name}": tensor}
