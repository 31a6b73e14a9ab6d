"""A small model that talks: its processor, pictures, and conversations to ask it."""

from __future__ import annotations

import numpy as np
import PIL.Image
from tests.model.small import PX, TOKENS_PER_TILE, small_model

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import TilingConfig
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.types import ImageRef, Message

WORDS = ["what is this? one two three four", "the quick brown fox, über 東京 jumps"]


def build(template: str = "internvl2_5") -> CascadeVLProcessor:
    return CascadeVLProcessor(
        build_tokenizer(WORDS * 3, 420),
        template=template,
        system_message="",
        tiling=TilingConfig(tile_px=PX, max_tiles=4),
        tokens_per_tile=TOKENS_PER_TILE,
    )


def model_for(processor: CascadeVLProcessor, **config) -> CascadeVLForConditionalGeneration:
    text = {"vocab_size": len(processor.tokenizer)} | config.pop("text", {})
    model = small_model(text=text, image_token_id=processor.image_token_id, **config)
    model.generation_config.eos_token_id = None
    return model


def picture(seed: int, size: tuple[int, int] = (50, 30)) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def conversations() -> list[list[Message]]:
    first, second = picture(0), picture(1, (20, 70))
    return [
        [Message.of("user", ImageRef(first), "what is this?")],
        [Message.of("user", "one two")],
        [Message.of("user", ImageRef(second), "one")],
        [Message.of("user", ImageRef(first), "the quick brown fox jumps over")],
        [Message.of("user", ImageRef(first), ImageRef(second), "two")],
        [Message.of("user", ImageRef(first), "what is this?")],
    ]
