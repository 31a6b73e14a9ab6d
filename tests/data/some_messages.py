"""Messages in transformers' form, and a processor's settings at a tiny size."""

from __future__ import annotations

from typing import Any

from tests.data.conftest import picture

from cascadevl.data.tiling import TilingConfig

TILING = TilingConfig(tile_px=28, max_tiles=6)
SMALL: dict[str, Any] = {"tiling": TILING, "tokens_per_tile": 4}


def image(seed: int = 0, width: int = 60, height: int = 28) -> dict[str, object]:
    return {"type": "image", "image": picture(width, height, seed)}


def text(words: str) -> dict[str, object]:
    return {"type": "text", "text": words}


TALK = [
    {"role": "user", "content": [image(), text("How many red squares?")]},
    {"role": "assistant", "content": [text("There are 3.")]},
    {"role": "user", "content": "And dogs?"},
]
