"""The configuration of a run that trains the router (ViCO, stage 2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cascadevl.errors import ConfigError
from cascadevl.losses.router import LabelForm
from cascadevl.train.config import BatchConfig, DataConfig, TrainConfig
from cascadevl.train.loop import RunConfig
from cascadevl.train.optim import OptimConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSection:
    """How tiles are labelled, and what the router is calibrated to.

    Attributes:
        reference: The model before ViCO, whose answers with all tiles full are the standard.
            Without one the model itself is, which leaves ``label: difference`` only.
        records: Draws of the data whose tiles are measured, text included, which has none.
        label: What is compared with the threshold: the ``ratio`` of the losses with and without
            compression, or their ``difference``.
        percentile: Of the latest tiles: so large a part is labelled to be compressed.
        window: How many tiles are the latest ones.
        floor: Least denominator of a ratio, as a share of the median of the latest denominators.
        balanced: Let both labels weigh alike, however many there are of each.
        held_out: Share of the records that the router is examined and calibrated with instead of
            trained; with 0 it is calibrated with those it was trained on.
        choose: Which router is exported: the ``best`` of all examinations (``run.eval_interval``)
            by the area under the ROC curve of the held-out tiles, or the ``last``.
        keep_share: Share of tiles that is to stay full: the absolute threshold in the exported
            model is the one that keeps so many of the held-out tiles.
        store: Folder of the measured losses; None for one in the run folder. Runs that differ only
            in labels or training share one.
        chunk: Draws that are measured and kept together.
        feature_bytes: Patch features that are kept in memory; others are encoded again when they
            are needed.
    """

    reference: str | None = None
    records: int = 4096  # ours: the report takes a subset of the SFT data, mostly OCR and VQA
    label: LabelForm = "ratio"  # InternVL3.5 report
    percentile: float = 50.0  # InternVL3.5 report: a balanced distribution
    window: int = 1024  # ours: the report says a sliding window
    floor: float = 0.1  # ours: docs/decisions/0030
    balanced: bool = True
    held_out: float = 0.1
    choose: Literal["best", "last"] = "best"  # ours: docs/decisions/0048
    keep_share: float = 1 / 3  # half of the visual tokens, as in the InternVL3.5 report
    store: Path | None = None
    chunk: int = 16
    feature_bytes: int = 2**31

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            ConfigError: If there is one.
        """
        for name in ("records", "window", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"router.{name} is {getattr(self, name)}; it must be at least 1")
        for name, most in (("percentile", 100.0), ("held_out", 0.9), ("keep_share", 1.0)):
            if not 0 <= (value := getattr(self, name)) <= most:
                raise ConfigError(f"router.{name} is {value}; it must lie in 0 to {most:g}")
        if self.floor < 0 or self.feature_bytes < 0:
            raise ConfigError(
                f"router.floor is {self.floor} and router.feature_bytes {self.feature_bytes}; "
                f"neither can be negative"
            )


def _data() -> DataConfig:
    return DataConfig(jpeg=False)  # ours: what is measured is what is served


def _batch() -> BatchConfig:
    return BatchConfig(packing="count", row_samples=16)  # ours: records of a micro-batch


def _optim() -> OptimConfig:
    return OptimConfig(lr=1e-4)  # ours: not published


def _run() -> RunConfig:
    return RunConfig(num_steps=1000, eval_interval=100, checkpoint_interval=200)  # ours


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig(TrainConfig):
    """A run that trains the router of a model after ViCO.

    ``batch.row_samples`` is the number of records of a micro-batch, ``batch.row_tokens`` the length
    of rows in which losses are measured; ``batch.averaging`` and ``data.prefetch`` mean nothing.

    Attributes:
        router: How tiles are labelled, and what the router is calibrated to.
    """

    data: DataConfig = field(default_factory=_data)
    batch: BatchConfig = field(default_factory=_batch)
    optim: OptimConfig = field(default_factory=_optim)
    run: RunConfig = field(default_factory=_run)
    router: RouterSection = field(default_factory=RouterSection)

    def __post_init__(self) -> None:
        """Refuse to divide what is not trained."""
        if self.model.shard is not None:
            raise ConfigError(
                f"model.shard is {self.model.shard}, but of the model the router alone is trained "
                "here, and the rest is read; leave it out"
            )
