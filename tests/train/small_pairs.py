"""A small real setting for MPO: coloured pictures, a right and a wrong answer to each, nano."""

from __future__ import annotations

import functools
from dataclasses import fields
from pathlib import Path
from typing import Any

import PIL.Image
from tests.train.small_run import small_config, tokenizer

from cascadevl.data.mixture import WeightedSource
from cascadevl.model.loading import save
from cascadevl.train.config import ModelConfig, TrainConfig
from cascadevl.train.mpo import MPOConfig, MPOSection
from cascadevl.train.start import from_scratch
from cascadevl.types import ImageRef, Message, Record

COLOURS = ("red", "green", "blue", "yellow", "white", "black")


class Pairs:
    """Pair number i shows colour i and is told apart by it; every third is text alone."""

    def __init__(self, length: int = 12, name: str = "colours") -> None:
        self.length, self.name = length, name

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Record:
        right, wrong = (COLOURS[(index + shift) % len(COLOURS)] for shift in (0, 1))
        asked: tuple[Any, ...] = (f"Not {wrong}. Which color?",)
        if index % 3:
            asked = (ImageRef(PIL.Image.new("RGB", (60 + index, 60), right)), "\nWhich color?")
        return Record(
            source=f"{self.name}:{index}",
            record_id=str(index),
            messages=(Message.of("user", *asked),),
            branches=(
                (Message.of("assistant", right),),
                (Message.of("assistant", f"there is {wrong} in it"),),
            ),
            dataset=self.name,
        )


def pairs(length: int = 12) -> tuple[WeightedSource, ...]:
    """The pairs as a run takes them."""
    return (WeightedSource(source=Pairs(length)),)


@functools.cache
def _start(folder: Path) -> Path:
    if not folder.exists():  # another process of the same test may come later
        model, processor = from_scratch(ModelConfig(preset="nano"), tokenizer(), seed=3)
        save(model, processor, folder)
    return folder


def mpo_config(out: Path, start: Path, **values: Any) -> MPOConfig:
    """A short run of MPO; ``section__key=value`` replaces a value.

    Args:
        out: Its run folder.
        start: Where the model that it starts from is, or is to be.
        values: What is not as below.
    """
    own = {key.removeprefix("mpo__"): values.pop(key) for key in list(values) if "mpo__" in key}
    lora = values.pop("lora", None)
    base = small_config(
        out,
        **{
            "model__preset": None,
            "model__path": str(_start(start)),
            "data__jpeg": True,
            "batch__packing": "count",
            "batch__row_samples": 2,
            "optim__warmup_ratio": 0.0,
            **values,
        },
    )
    sections = {each.name: getattr(base, each.name) for each in fields(TrainConfig)}
    settings = MPOSection(**{"reference_part": 5, **own})
    return MPOConfig(**{**sections, "lora": lora}, mpo=settings)
