"""A plain model made ready to learn compression: a second projector and a router, both new."""

from __future__ import annotations

import copy

import torch
from torch import nn

from cascadevl.errors import ConfigError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.projector import CompressedProjector
from cascadevl.model.router import Router


def add_flash(
    model: CascadeVLForConditionalGeneration, *, seed: int, num_heads: int | None = None
) -> None:
    """Give a model a projector for compressed tiles and a router, in place.

    They have random weights: linear ones as transformers draws them. Until the router is trained
    and a threshold calibrated (`cascadevl.model.routing.calibrated`), all tiles stay full unless a
    request asks otherwise, so the model answers as before.

    Args:
        model: A model without them.
        seed: Of the random weights; the global generator is left as it was.
        num_heads: Heads of the router's attention; None for the configuration's (16, as released).

    Raises:
        ConfigError: If it has them already, or its tiles and widths do not allow them.
    """
    if model.config.flash_mode:
        raise ConfigError("the model has a second projector and a router already")
    config = copy.deepcopy(model.config)
    config.flash_mode, config.flash_layers = True, "all"
    config.flash_heads = config.flash_heads if num_heads is None else num_heads
    config.check_flash()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        parts = CompressedProjector(config), Router(config)
        std = float(config.text_config.initializer_range)
        for linear in (m for part in parts for m in part.modules() if isinstance(m, nn.Linear)):
            linear.weight.normal_(std=std)
            linear.bias.zero_()
    for part in parts:
        part.to(model.device, model.dtype).train(model.training)
    model.model.compressed_projector, model.model.router = parts
    for key in ("flash_mode", "flash_layers", "flash_heads"):
        setattr(model.config, key, getattr(config, key))
