"""A small model of every family of text body, with random weights everywhere."""

from __future__ import annotations

from typing import Any

import torch
from tests.model.test_parity import SMALL, TEXT, config_of
from transformers import InternLM3Config, LlamaConfig

from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.modeling import CascadeVLForConditionalGeneration

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}

BODIES = {
    **{name: TEXT[name] for name in ("qwen2", "qwen2 windows", "qwen3", "qwen3_moe", "gpt_oss")},
    "internlm2": lambda: LlamaConfig(**SMALL, rope_parameters=DYNAMIC),
    "internlm3": lambda: InternLM3Config(**SMALL, rope_parameters=DYNAMIC),
}
"""Text configurations: InternVL3 uses the first, InternVL3.5 those from Qwen3 on."""


def body_model(
    name: str, *, seed: int = 0, vocab_size: int | None = None, **config: Any
) -> CascadeVLForConditionalGeneration:
    """A model in evaluation mode with this text body, tiles of 28 px and 4 visual tokens."""
    values = config_of("qwen2", "300M") | {"text_config": BODIES[name]()}
    if vocab_size is not None:
        values["text_config"].vocab_size = vocab_size
    model = CascadeVLForConditionalGeneration(CascadeVLConfig(**values | config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # biases, sinks and position embeddings too
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()
