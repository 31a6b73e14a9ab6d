"""A small real setting for the router: pages that are busy in part, nano before and after ViCO."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from tests.train.small_run import QUIET, small_config, tokenizer

from cascadevl.data.mixture import WeightedSource
from cascadevl.errors import DataError
from cascadevl.model.flash import add_flash
from cascadevl.model.loading import save
from cascadevl.train.config import ModelConfig, TrainConfig
from cascadevl.train.router import router
from cascadevl.train.router_config import RouterConfig, RouterSection
from cascadevl.train.run import TrainResult
from cascadevl.train.start import from_scratch
from cascadevl.types import ImageRef, Message, Record

PX = 112
NUM_RECORDS = 24


class Pages:
    """Page i has two tiles, of which one or both are busy; every fifth record is text, one broken.

    Record 3 of every ten cannot be used.
    """

    def __init__(self, length: int = 20, name: str = "pages") -> None:
        self.length, self.name = length, name

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Record:
        source = f"{self.name}:{index}"
        if index % 10 == 3:
            raise DataError("the page is torn", kind="corrupt_image", source=source)
        asked: tuple[Any, ...] = ("Which color?",)
        if index % 5:
            generator = np.random.default_rng(index)
            pixels = np.full((PX, 2 * PX, 3), 40 * (index % 6), dtype=np.uint8)
            busy = generator.integers(0, 256, size=(PX, PX, 3))
            start = PX * (index % 2)
            pixels[:, start : start + PX] = busy
            asked = (ImageRef(PIL.Image.fromarray(pixels)), "\nWhich color?")
        return Record(
            source=source,
            record_id=str(index),
            messages=(Message.of("user", *asked), Message.of("assistant", "red and green")),
            dataset=self.name,
        )


def pages(length: int = 20) -> tuple[WeightedSource, ...]:
    return (WeightedSource(source=Pages(length)),)


def write_start(folder: Path) -> tuple[Path, Path]:
    """The model after ViCO, and the one before it, which differ a little."""
    model, processor = from_scratch(ModelConfig(preset="nano"), tokenizer(), seed=3)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(6)  # random weights alone hardly care for pictures
    save(model, processor, folder / "before")
    add_flash(model, seed=4)
    generator = torch.Generator().manual_seed(5)
    assert model.model.compressed_projector is not None
    with torch.no_grad():
        for parameter in model.model.compressed_projector.parameters():
            parameter.mul_(6)
        for parameter in model.model.language_model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    save(model, processor, folder / "after")
    return folder / "after", folder / "before"


def router_config(out: Path, start: tuple[Path, Path], **values: Any) -> RouterConfig:
    """A short run; ``section__key=value`` replaces a value."""
    after, before = start
    own = {
        key.removeprefix("router__"): values.pop(key) for key in list(values) if "router__" in key
    }
    base = small_config(
        out,
        **{
            "model__preset": None,
            "model__path": str(after),
            "data__jpeg": False,
            "data__max_tiles": 2,
            "batch__packing": "count",
            "batch__row_samples": 4,
            "batch__row_tokens": 500,
            "optim__warmup_ratio": 0.0,
            **values,
        },
    )
    sections = {each.name: getattr(base, each.name) for each in fields(TrainConfig)}
    section = {"reference": str(before), "records": NUM_RECORDS, "held_out": 0.3, "chunk": 5, **own}
    return RouterConfig(**sections, router=RouterSection(**section))


def run(out: Path, start: tuple[Path, Path], *, on_step: Any = None, **values: Any) -> TrainResult:
    config = router_config(out, start, **values)
    return router(config, sources=pages(), on_step=on_step, console=QUIET)
