"""The words that are drawn and spelled, and the fonts to draw them in.

A word belongs to the training or the test part by a checksum of its spelling, so every task that
speaks of words holds out the same ones. The fonts are those that matplotlib and Pillow ship.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
import PIL.ImageFont

from cascadevl.tasks.base import Split, pick

FONTS = {
    "sans": "DejaVuSans.ttf",
    "sans bold": "DejaVuSans-Bold.ttf",
    "sans oblique": "DejaVuSans-Oblique.ttf",
    "serif": "DejaVuSerif.ttf",
    "serif bold": "DejaVuSerif-Bold.ttf",
    "serif italic": "DejaVuSerif-Italic.ttf",
    "mono": "DejaVuSansMono.ttf",
    "times": "STIXGeneral.ttf",
    "times bold": "STIXGeneralBol.ttf",
    "roman": "cmr10.ttf",
    "grotesque": "cmss10.ttf",
    "typewriter": "cmtt10.ttf",
    "round": "",
}
"""File of each font among matplotlib's; the empty one is Pillow's own (Aileron)."""

_TEST_SHARE = 5
"""One word in five is held out for testing."""


def is_test_word(word: str) -> bool:
    """Whether a word belongs to the test part."""
    return zlib.crc32(word.encode()) % _TEST_SHARE == 0


@lru_cache(maxsize=2)
def load_words(split: Split) -> tuple[str, ...]:
    """The words of the training or the test part, in alphabetical order."""
    text = resources.files("cascadevl").joinpath("assets/tasks/words.txt").read_text("utf-8")
    words = [line for line in text.splitlines() if not line.startswith("#")]
    return tuple(word for word in words if is_test_word(word) == (split == "test"))


@lru_cache(maxsize=64)
def words_of_length(split: Split, fewest: int, most: int) -> tuple[str, ...]:
    """The words of a part with so many letters."""
    return tuple(word for word in load_words(split) if fewest <= len(word) <= most)


def invent_word(generator: np.random.Generator, length: int) -> str:
    """The beginning of one training word and the end of another, never a held-out word.

    Args:
        generator: Source of the words and of the place to cut them.
        length: Letters, 3 to 8.
    """
    words = words_of_length("train", length, length)
    while True:
        cut = int(generator.integers(1, length))
        word = pick(generator, words)[:cut] + pick(generator, words)[cut:]
        if not is_test_word(word):
            return word


@lru_cache(maxsize=512)
def font(name: str, size_px: int) -> PIL.ImageFont.FreeTypeFont:
    """A font at a size.

    Args:
        name: A key of ``FONTS``.
        size_px: Height of its em square.
    """
    if not FONTS[name]:
        default = PIL.ImageFont.load_default(size_px)
        assert isinstance(default, PIL.ImageFont.FreeTypeFont), "Pillow was built without FreeType"
        return default
    return PIL.ImageFont.truetype(_font_folder() / FONTS[name], size_px)


@lru_cache(maxsize=1)
def _font_folder() -> Path:
    import matplotlib  # only for its data folder; its plotting is not used

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"
