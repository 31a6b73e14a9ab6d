"""Models small enough to be trained from scratch on two CPU cores, in the released architecture.

InternViT with class token and layer scale, pixel shuffle, two-layer projector and a Qwen3 decoder,
only narrower and with smaller tiles (design section 7). The released sizes are in
`cascadevl.model.zoo`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Qwen3Config
from transformers.models.internvl import InternVLVisionConfig

from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.modeling import CascadeVLForConditionalGeneration


def nano_config(vocab_size: int, **overrides: Any) -> CascadeVLConfig:
    """About 1 M parameters of vision and 2 M of language at 112 px: trained in minutes.

    Args:
        vocab_size: Tokens of the tokenizer.
        overrides: Keys of the configuration, or of a half as ``vision_config={...}`` and
            ``text_config={...}``, which change only the keys they name. ``image_token_id`` must be
            the tokenizer's.
    """
    vision = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision |= {"intermediate_size": 512, "image_size": 112}
    text = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6}
    text |= {"num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 512}
    return _config(vocab_size, vision, text, overrides)


def micro_config(vocab_size: int, **overrides: Any) -> CascadeVLConfig:
    """About 2 M parameters of vision and 4 M of language at 112 px: trained in hours.

    Larger pictures are cut into tiles, as at every other size of the family.

    Args:
        vocab_size: Tokens of the tokenizer.
        overrides: As for `nano_config`.
    """
    vision = {"hidden_size": 192, "num_hidden_layers": 5, "num_attention_heads": 6}
    vision |= {"intermediate_size": 768, "image_size": 112}
    text = {"hidden_size": 256, "num_hidden_layers": 5, "num_attention_heads": 8}
    text |= {"num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 640}
    return _config(vocab_size, vision, text, overrides)


def _config(
    vocab_size: int, vision: dict[str, Any], text: dict[str, Any], overrides: dict[str, Any]
) -> CascadeVLConfig:
    vision = {"attention_bias": True, "norm_type": "layer_norm", "patch_size": 14, **vision}
    vision |= overrides.pop("vision_config", {})
    text = {"vocab_size": vocab_size, "tie_word_embeddings": True, **text}
    text |= {
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    text |= overrides.pop("text_config", {})
    values: dict[str, Any] = {
        "system_message": "",
        "trained_context": text["max_position_embeddings"],
    }
    values |= {"tie_word_embeddings": text["tie_word_embeddings"], **overrides}
    config = CascadeVLConfig(
        vision_config=InternVLVisionConfig(**vision), text_config=Qwen3Config(**text), **values
    )
    config.image_seq_length = config.tokens_per_tile
    return config


def sincos_positions(side: int, width: int) -> Float[Tensor, "patches width"]:
    """Fixed two-dimensional position codes: sines and cosines of row and column.

    Args:
        side: Patches along each side of a tile.
        width: Channels, a multiple of 4: half for the row, half for the column.

    Raises:
        ValueError: If the width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"2-D sine and cosine codes need a width divisible by 4, not {width}")
    frequency = 1e4 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency  # (side, width / 4)
    code = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows = code[:, None].expand(side, side, -1)
    columns = code[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, width).float()


def initialise(
    model: CascadeVLForConditionalGeneration,
    seed: int,
    *,
    positions: str = "sincos",
    position_std: float = 0.1,
    layer_scale: float | None = None,
) -> None:
    """Give a model that is trained from scratch its first weights, in place.

    All weights are drawn as transformers draws them (normal, the configurations' standard
    deviations), from the seed. transformers leaves the position embeddings and the class token of
    the vision tower at zero, because it expects a checkpoint; with zeros a tile's patches are an
    unordered set and nothing tells the class token's place. Here they get values.

    Args:
        model: The model.
        seed: Seed of the draw; the global generator is left as it was.
        positions: ``"sincos"`` for fixed codes of row and column, ``"normal"`` for random ones.
        position_std: Root mean square of the position embeddings; the class token gets 0.02.
        layer_scale: First value of the layer scale; None for the configuration's.

    Raises:
        ValueError: If ``positions`` is neither of the two.
    """
    if positions not in ("sincos", "normal"):
        raise ValueError(f"positions is {positions!r}; it must be 'sincos' or 'normal'")
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        model.load_state_dict(type(model)(model.config).state_dict())
        tower: Any = model.model.vision_tower
        embeddings = tower.embeddings
        embeddings.cls_token.normal_(std=0.02)
        table = embeddings.position_embeddings
        table.normal_(std=position_std)
        if positions == "sincos":
            code = sincos_positions(math.isqrt(table.shape[1] - 1), table.shape[2])
            table[0, 1:] = code.to(table) * (position_std * math.sqrt(2))
        if layer_scale is not None:
            for layer in tower.encoder.layer:
                layer.lambda_1.fill_(layer_scale)
                layer.lambda_2.fill_(layer_scale)
