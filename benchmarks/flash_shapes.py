"""The shapes that bench_flash.py times: that of 1B, that of 38B made smaller, and vision towers."""

from __future__ import annotations

import torch

from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.cost import Work, causal_pairs, forward_flops
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.presets import nano_config
from cascadevl.model.zoo import config_for

SCALE = 8
"""By how much the widths of 38B are divided; its text body has half of the layers."""


def shapes(tiny: bool) -> dict[str, CascadeVLConfig]:
    """The shapes, all with a second projector and a router."""
    if tiny:
        return {"nano": nano_config(2048, image_token_id=7, flash_mode=True)}
    return {
        "1b": flash_of(config_for("InternVL3.5-1B")),
        "38b scaled": scaled(config_for("InternVL3.5-38B")),
    }


def flash_of(config: CascadeVLConfig) -> CascadeVLConfig:
    """A shape with compressed tiles, all layers of the router in use."""
    config.flash_mode, config.flash_layers = True, "all"
    config.check_flash()
    return config


def balance(config: CascadeVLConfig) -> float:
    """Operations of the vision tower for a tile over those of the text body for its tokens."""
    tokens = config.tokens_per_tile
    cost = forward_flops(config, Work(tokens=tokens, tiles=1, pairs=causal_pairs([tokens])))
    return cost.vision / cost.language


def scaled(config: CascadeVLConfig) -> CascadeVLConfig:
    """A small shape in which vision tower and text body do the same shares of the work.

    Widths are divided, heads stay nearly as wide as they are, because the time of a softmax goes by
    the number of heads; the depth of the vision tower is what brings the ratio nearest.
    """
    wanted = balance(config)
    vision, text = config.vision_config, config.text_config
    head_width = vision.hidden_size // vision.num_attention_heads
    for part in (vision, text):
        part.hidden_size //= SCALE
        part.intermediate_size //= SCALE
    width = vision.hidden_size
    vision.num_attention_heads = next(
        heads for heads in range(1, width) if width % heads == 0 and width <= heads * head_width
    )
    text.num_attention_heads //= SCALE
    text.num_key_value_heads = max(1, text.num_key_value_heads // SCALE)
    text.num_hidden_layers //= 2
    text.layer_types = text.layer_types[: text.num_hidden_layers]
    depths = range(1, vision.num_hidden_layers + 1)

    def distance(depth: int) -> float:
        vision.num_hidden_layers = depth
        return abs(balance(config) - wanted)

    vision.num_hidden_layers = min(depths, key=distance)
    print(f"38b scaled: vision over language {balance(config):.3f}, as released {wanted:.3f}")
    return flash_of(config)


def models_of(
    config: CascadeVLConfig, dtype: torch.dtype
) -> tuple[CascadeVLForConditionalGeneration, CascadeVLForConditionalGeneration]:
    """The plain model and the Flash model, which share all tensors that the plain one has."""
    torch.manual_seed(0)
    flash = CascadeVLForConditionalGeneration(config).to(dtype).eval()
    bare = type(config).from_dict(config.to_dict() | {"flash_mode": False})
    with torch.device("meta"):
        plain = CascadeVLForConditionalGeneration(bare)
    tensors = flash.state_dict()
    plain.load_state_dict({name: tensors[name] for name in plain.state_dict()}, assign=True)
    buffers = dict(flash.named_buffers())
    for name, module in plain.named_modules():  # rotary frequencies are no part of a state
        for buffer in list(module._buffers):
            module._buffers[buffer] = buffers[f"{name}.{buffer}" if name else buffer]
    return plain.eval(), flash


def towers(tiny: bool) -> dict[str, CascadeVLConfig]:
    """The vision towers whose routers are timed."""
    if tiny:
        return {"nano": nano_config(2048, image_token_id=7, flash_mode=True)}
    names = {"300M": "InternVL3.5-1B", "6B": "InternVL3.5-38B"}
    return {name: flash_of(config_for(size)) for name, size in names.items()}
