"""Two tokenizers, made once: one in Qwen's style, one that also has GPT-OSS's control tokens."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
from transformers import AddedToken, PreTrainedTokenizerFast

from cascadevl.data.tokenizer import build_tokenizer

TEXTS = [
    "How many red squares are there? There are 3.",
    "What is the number? It is 1407. Describe the picture. A small green dog.",
    "Image-1: Image-2: Frame-1: compare them, then add 12 and 30.",
    "<think>\n12 and 30 are 42.\n</think>\n\n42",
]

GPT_OSS_TOKENS = [
    *("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
    *("<|constrain|>", "<|startoftext|>"),
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(TEXTS, 500)


@pytest.fixture(scope="session")
def gpt_oss_tokenizer() -> PreTrainedTokenizerFast:
    made = build_tokenizer(TEXTS, 500)
    made.add_tokens([AddedToken(token, special=True) for token in GPT_OSS_TOKENS])
    made.eos_token = "<|return|>"
    return made


def picture(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)
