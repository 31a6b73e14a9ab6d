"""The smallest models for tests: 28 px tiles of four visual tokens, two layers on each side."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3Config
from transformers.models.internvl import InternVLVisionConfig

from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.modeling import CascadeVLForConditionalGeneration

IMAGE, VOCAB, PX, TOKENS_PER_TILE = 7, 97, 28, 4


def small_config(*, text: dict[str, Any] | None = None, **overrides: Any) -> CascadeVLConfig:
    """A Qwen3 shape, with keys of the text config and of the whole config changed."""
    vision_config = InternVLVisionConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=PX,
        patch_size=7,
        attention_bias=True,
    )
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 48,
        "max_window_layers": 1,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    return CascadeVLConfig(
        vision_config=vision_config,
        text_config=Qwen3Config(**values | (text or {})),
        image_seq_length=TOKENS_PER_TILE,
        **{"image_token_id": IMAGE, "tie_word_embeddings": False} | overrides,
    )


def small_model(seed: int = 0, **config: Any) -> CascadeVLForConditionalGeneration:
    """A model in evaluation mode with random weights everywhere, biases and positions too."""
    model = CascadeVLForConditionalGeneration(small_config(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


def small_flash_model(seed: int = 0, **config: Any) -> CascadeVLForConditionalGeneration:
    """The same with a second projector and a router: four visual tokens a tile, or one.

    Without thresholds, so that a budget must be asked for.
    """
    model = small_model(seed, **{"flash_mode": True, "flash_heads": 3} | config)
    assert model.model.router is not None
    with torch.no_grad():  # tiles are to differ in what the router thinks of them
        for parameter in model.model.router.parameters():
            parameter.mul_(6)
    return model
