"""A small real setting for ViCO: pictures of two colours in stripes, and a nano that reads them."""

from __future__ import annotations

import functools
from dataclasses import fields
from pathlib import Path
from typing import Any

import PIL.Image
from tests.train.small_run import QUIET, small_config, tokenizer

from cascadevl.data.mixture import WeightedSource
from cascadevl.train.config import TrainConfig
from cascadevl.train.pretrain import pretrain
from cascadevl.train.vico import ViCOConfig, ViCOSection
from cascadevl.types import ImageRef, Message, Record

COLOURS = ("red", "green", "blue", "yellow", "white", "black")


class Stripes:
    """Record number i shows two colours in narrow stripes and asks for both; some are text alone.

    Stripes are two patches wide, so that a full token has one colour and a compressed one both.
    """

    def __init__(
        self, length: int = 24, name: str = "stripes", *, text_every: int = 6, tiles: int = 1
    ) -> None:
        self.length, self.name, self.text_every, self.tiles = length, name, text_every, tiles

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Record:
        first, second = COLOURS[index % 6], COLOURS[(index + 1 + index // 6) % 6]
        asked: tuple[Any, ...] = (f"{first} {second}. Which color?",)
        if index % self.text_every:
            asked = (ImageRef(striped(first, second, 112 * self.tiles)), "\nWhich color?")
        return Record(
            source=f"{self.name}:{index}",
            record_id=str(index),
            messages=(
                Message.of("user", *asked),
                Message.of("assistant", f"{first} left, {second} right"),
            ),
            dataset=self.name,
        )


def striped(first: str, second: str, width: int = 112) -> PIL.Image.Image:
    """A picture in which two colours take turns, column by column."""
    image = PIL.Image.new("RGB", (width, 112), first)
    for left in range(28, width, 56):
        image.paste(second, (left, 0, left + 28, 112))
    return image


def stripes(length: int = 24, **how: Any) -> tuple[WeightedSource, ...]:
    """The records as a run takes them."""
    return (WeightedSource(source=Stripes(length, **how)),)


@functools.cache
def read_stripes(folder: Path, num_steps: int = 45) -> Path:
    """A nano that has learned them with full tiles; trained unless it is there."""
    config = small_config(
        folder,
        model__precision="float32",
        batch__packing="count",
        batch__row_samples=8,
        data__jpeg=False,
        optim__name="muon",
        optim__lr=1e-3,
        optim__muon_lr=4e-3,
        run__num_steps=num_steps,
        run__checkpoint_interval=0,
        run__resume=True,
    )
    result = pretrain(config, sources=stripes(), tokenizer=tokenizer(), console=QUIET)
    assert result.model_path is not None
    return result.model_path


def vico_config(out: Path, start: Path | str, **values: Any) -> ViCOConfig:
    """A short run of ViCO; ``section__key=value`` replaces a value.

    Args:
        out: Its run folder.
        start: The model that it starts from.
        values: What is not as below.
    """
    own = {key.removeprefix("vico__"): values.pop(key) for key in list(values) if "vico__" in key}
    lora = values.pop("lora", None)
    base = small_config(
        out,
        **{
            "model__preset": None,
            "model__path": str(start),
            "data__jpeg": True,
            "batch__packing": "count",
            "batch__row_samples": 6,
            "batch__averaging": "sample",
            "optim__warmup_ratio": 0.0,
            **values,
        },
    )
    sections = {each.name: getattr(base, each.name) for each in fields(TrainConfig)}
    section = ViCOSection(**{"reference_part": 5, "top_tokens": 16, **own})
    return ViCOConfig(**{**sections, "lora": lora}, vico=section)
