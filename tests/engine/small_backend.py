"""A small checkpoint, its processor, and requests about pictures, for tests of backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from tests.model import make_checkpoints as make
from tests.model.small import PX, TOKENS_PER_TILE, small_model

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import TilingConfig
from cascadevl.engine.requests import Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.model.loading import save
from cascadevl.types import ImageRef, Message


def picture(seed: int, size: tuple[int, int] = (90, 60)) -> ImageRef:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return ImageRef(PIL.Image.fromarray(pixels))


def conversations() -> list[list[Message]]:
    """With one picture of several tiles, with none, with two."""
    return [
        [Message.of("user", picture(0), "\nWhat is written on the door?")],
        [Message.of("user", "The door")],
        [Message.of("user", picture(1, (40, 70)), picture(2), "\nis red")],
    ]


def requests_of(
    processor: CascadeVLProcessor, *, num_samples: int = 1, **sampling: Any
) -> list[Request]:
    """A request for each of the conversations."""
    params = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **sampling})
    return [
        Request(prompt=processor.prompt(each), sampling=params, num_samples=num_samples)
        for each in conversations()
    ]


def checkpoint(folder: Path, family: str = "qwen3", **config: Any) -> Path:
    """A checkpoint with random weights."""
    tensors = make.github_tensors(family)
    github = make.github_config(family, max_dynamic_patch=4, **config)
    return make.write(folder, tensors, github)


HEADS_OF_64 = {
    "hidden_size": 128,
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
}
"""As small as vLLM's attention allows on a CPU, which knows heads of 32 and more."""


def vllm_checkpoint(folder: Path) -> Path:
    """A checkpoint with random weights that a real vLLM server opens."""
    processor = CascadeVLProcessor(
        make.tokenizer(),
        system_message="",
        tiling=TilingConfig(tile_px=PX, max_tiles=4),
        tokens_per_tile=TOKENS_PER_TILE,
    )
    text = {"vocab_size": len(processor.tokenizer), **HEADS_OF_64}
    model = small_model(text=text, image_token_id=processor.image_token_id)
    save(model, processor, folder)
    return folder
