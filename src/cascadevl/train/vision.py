"""Teaching a vision tower by itself: what stands in each patch of a page, before any language.

The reports start from a ViT that was trained on its own (InternViT-300M and -6B V2.5). A preset
has none, and learning to see through the answers of a language model that cannot speak yet takes
most of its training. Here two linear heads read every patch feature: which thing covers the
patch, and whether the middle of one lies in it. The heads are thrown away afterwards.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import PIL.Image
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from cascadevl.data.tiling import normalise
from cascadevl.errors import ConfigError
from cascadevl.model.loading import save as save_model
from cascadevl.train.config import TrainConfig
from cascadevl.train.loop import TrainState, settled, train
from cascadevl.train.objective import Objective, Terms
from cascadevl.train.optim import Optimiser, set_precision
from cascadevl.train.run import MODEL, TrainResult, begin, open_log, saver, take_up
from cascadevl.train.start import from_scratch, start_from

NOTHING_WEIGHT = 0.1
"""Weight of a patch in which nothing stands: most are, and they are soon learned."""


@runtime_checkable
class Page(Protocol):
    """A picture with what stands in each of its patches; class 0 is nothing."""

    @property
    def image(self) -> PIL.Image.Image: ...  # noqa: D102
    @property
    def classes(self) -> Int64[np.ndarray, "side side"]: ...  # noqa: D102
    @property
    def centres(self) -> Bool[np.ndarray, "side side"]: ...  # noqa: D102


@runtime_checkable
class PageSource(Protocol):
    """Pages by number, as many as wanted."""

    def __getitem__(self, index: int, /) -> Page: ...  # noqa: D105


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PageBatch:
    """Some pages.

    Attributes:
        tiles: The pages, in RGB: one tile each.
        classes: Class of every patch.
        centres: Whether the middle of a thing lies in it.
        sources: Numbers of the pages, for errors.
    """

    tiles: UInt8[Tensor, "pages px px 3"]
    classes: Int64[Tensor, "pages patches"]
    centres: Bool[Tensor, "pages patches"]
    sources: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        """Patches of all pages."""
        return self.classes.numel()

    @property
    def num_tiles(self) -> int:
        """Number of pages."""
        return len(self.tiles)

    def to(self, device: torch.device | str) -> PageBatch:
        """The same batch on another device."""
        return replace(
            self,
            tiles=self.tiles.to(device),
            classes=self.classes.to(device),
            centres=self.centres.to(device),
        )


class PageStream:
    """Batches of pages in order, shared out over processes."""

    def __init__(self, pages: PageSource, num_pages: int, rank: int, world_size: int) -> None:
        """Start with page 0."""
        self._pages, self._num_pages = pages, num_pages
        self._rank, self._world_size = rank, world_size
        self._next = 0

    def __next__(self) -> PageBatch:
        """The next batch of this process."""
        first = (self._next * self._world_size + self._rank) * self._num_pages
        numbers = range(first, first + self._num_pages)
        self._next += 1
        drawn = [self._pages[number] for number in numbers]
        classes = np.stack([page.classes for page in drawn]).reshape(len(drawn), -1)
        centres = np.stack([page.centres for page in drawn]).reshape(len(drawn), -1)
        return PageBatch(
            tiles=torch.from_numpy(np.stack([np.asarray(page.image) for page in drawn])),
            classes=torch.from_numpy(classes),
            centres=torch.from_numpy(centres),
            sources=tuple(f"page {number}" for number in numbers),
        )

    def state_dict(self) -> dict[str, Any]:
        """How many batches were taken."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on after that many."""
        self._next = state["next"]


class PatchReader(nn.Module):
    """A vision tower with a head for classes and one for middles, on every patch feature."""

    def __init__(self, vision_tower: nn.Module, width: int, num_classes: int) -> None:
        """Put fresh heads on a tower."""
        super().__init__()
        self.vision_tower = vision_tower
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, num_classes)
        self.centres = nn.Linear(width, 1)

    def forward(
        self, tiles: UInt8[Tensor, "pages px px 3"]
    ) -> tuple[Float[Tensor, "pages patches classes"], Float[Tensor, "pages patches"]]:
        """Logits of the class of each patch, and of a middle in it; float32."""
        pixel_values = normalise(tiles).to(self.classes.weight.dtype)
        features = self.vision_tower(pixel_values=pixel_values).last_hidden_state[:, 1:]
        features = self.norm(features)  # the class token is not asked
        return self.classes(features).float(), self.centres(features)[..., 0].float()


def _weights(batch: PageBatch) -> Float[Tensor, "pages patches"]:
    return torch.where(batch.classes == 0, NOTHING_WEIGHT, 1.0)


def _loss(model: nn.Module, batch: PageBatch, weight_sum: float) -> Terms:
    """Weighted cross-entropy of the classes plus that of the middles."""
    class_logits, centre_logits = model(batch.tiles)
    weights = _weights(batch)
    nll = functional.cross_entropy(class_logits.mT, batch.classes, reduction="none")
    middle = functional.binary_cross_entropy_with_logits(
        centre_logits, batch.centres.float(), reduction="none"
    )
    there = batch.classes > 0
    right = (class_logits.argmax(-1) == batch.classes) & there
    return Terms(
        ((nll + middle) * weights).sum() / weight_sum,
        {"accuracy": (right.sum() / there.sum().clamp(min=1)).float()},
    )


PATCHES: Objective[PageBatch] = Objective(
    weigh=lambda batch: float(_weights(batch).sum(dtype=torch.float64)), loss=_loss
)
"""What stands in every patch, and where the middles are."""


def pretrain_vision(
    config: TrainConfig,
    *,
    pages: PageSource,
    num_classes: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_step: Callable[[TrainState[PageBatch]], None] | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train a vision tower on pages; the language half beside it stays as it is.

    ``batch.row_samples`` pages make a micro-batch.

    Args:
        config: The run. It names a preset, to start from random weights, or a model to go on with.
        pages: The pages, of the model's tile size.
        num_classes: Classes of patches, nothing included.
        tokenizer: The preset's, which the finished model is saved with; the one in the configured
            folder if None.
        on_step: Called every ``run.eval_interval`` steps and at the end; the state's model is a
            `PatchReader`.
        console: Where progress is shown; standard error if None.

    Raises:
        ConfigError: If the configuration names neither.
        TrainingError: If the run breaks, or cannot be taken up again.
    """
    if config.model.shard is not None:
        raise ConfigError("a vision tower alone is not divided; leave model.shard out")
    accelerator = begin(config.run.seed)
    run = settled(config.run, rows=1, num_processes=accelerator.num_processes)
    if config.model.preset is not None:
        model, processor = from_scratch(config.model, tokenizer, seed=config.run.seed)
    elif config.model.path is not None:
        model, processor = start_from(config.model)
    else:
        raise ConfigError(
            "a vision tower is trained from random weights or gone on with: give model.preset or "
            "model.path"
        )
    width = model.config.vision_config.hidden_size
    reader = PatchReader(model.model.vision_tower, width, num_classes)
    set_precision(model, config.model.precision)
    set_precision(reader, config.model.precision)
    reader.to(accelerator.device)
    state = TrainState(
        model=reader,
        optimiser=Optimiser(reader.named_parameters(), config.optim),
        stream=PageStream(
            pages, config.batch.row_samples, accelerator.process_index, accelerator.num_processes
        ),
        accelerator=accelerator,
    )
    take_up(state, config)
    with open_log("vision", config, state, console) as log:
        finished = train(state, run, PATCHES, log=log, save=saver(config), on_step=on_step)
    path = config.run.out / MODEL if finished else None
    if path is not None and accelerator.is_main_process:
        if path.exists():  # of the same run, taken up again after its end
            shutil.rmtree(path)
        save_model(model, processor, path)
    accelerator.wait_for_everyone()
    return TrainResult(
        steps=state.step,
        finished=finished,
        loss=state.metrics.get("loss"),
        counters=dict(state.counters),
        skipped={},
        model_path=path,
    )
