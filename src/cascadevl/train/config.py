"""The configuration of a training run: one frozen dataclass, filled from YAML and overrides.

What configures one part stands beside that part (`OptimConfig`, `RunConfig`); here are the
sections that several parts read, and the whole. Defaults are the values of the released
InternVL3.5 SFT scripts for Qwen3 language models, unless a comment names another source.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from cascadevl.data.ratios import parse_ratio
from cascadevl.errors import ConfigError
from cascadevl.losses.next_token import Averaging
from cascadevl.train.loop import RunConfig
from cascadevl.train.lora import LoraConfig
from cascadevl.train.optim import Module, OptimConfig

FREE_KEYS = (
    "run.out",
    "run.resume",
    "run.log_interval",
    "run.eval_interval",
    "run.checkpoint_interval",
    "run.keep_last",
    "run.compile",
    "data.prefetch",
    "lora.merge",
    "rollout.store",
    "router.store",
    "router.chunk",
    "router.feature_bytes",
)
"""Keys in which a resumed run may differ: they do not change what is learned from what."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What is trained.

    Attributes:
        path: A model folder or name to start from; None if a preset is built from scratch.
        preset: A small shape to build with random weights.
        tokenizer: Folder of the preset's tokenizer, where the caller gives none.
        precision: Of the weights; bfloat16 weights are updated through float32 masters.
        frozen: Parts that stay as they are.
        drop_path: Rate at which the vision tower's blocks are skipped; None keeps the model's.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping
            them (on in all released scripts).
        shard: Keep a part of the weights on each process instead of a copy (FSDP2): ``full`` over
            all of them, ``hybrid`` over those of a host, with a copy on each host.
    """

    path: str | None = None
    preset: Literal["nano", "micro"] | None = None
    tokenizer: Path | None = None
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    frozen: tuple[Module, ...] = ()  # InternVL3's second SFT froze the vision tower
    drop_path: float | None = None  # 0 for 1B to 4B, 0.1 for 8B to 30B, 0.4 for 38B and 241B
    gradient_checkpointing: bool = False
    shard: Literal["full", "hybrid"] | None = None

    def __post_init__(self) -> None:
        """Refuse two starting points."""
        if self.path is not None and self.preset is not None:
            raise ConfigError(
                f"model.path is {self.path!r} and model.preset {self.preset!r}; give one of them"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The precision as torch's type."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What it is trained on, and how records become examples.

    Attributes:
        meta: Meta files that list data sets; unused where a recipe is given sources in code.
        weights: Draws of each data set relative to the others, by name, instead of size and
            ``repeat_time``. Either all data sets have one or none.
        mixture: Text to multimodal: ``internvl3`` (1:3), ``internvl3_5`` (1:2.5),
            ``internvl3_5_sft`` (1:3.5), any ``"a:b"``, or ``as_given`` for no ratio at all.
        mixture_unit: What the ratio counts. InternVL3 counts tokens, InternVL3.5 does not say.
        mixture_examples: Records of each data set built at most to learn its tokens a record.
        max_tokens: Longer samples are left out and counted.
        max_tiles: Most tiles an image; None for the model's own limit.
        jpeg: Degrade every picture by random JPEG compression, not only those of data sets
            whose meta file says so.
        increment: Position step of visual tokens (V2PE); ``"random"`` draws one for each image.
        min_frames: Fewest frames drawn from a video.
        max_frames: Most frames drawn from a video.
        max_skipped_share: Share of unusable records beyond which the run stops.
        prefetch: Batches made ahead in a thread; 0 makes them when they are needed.
    """

    meta: tuple[Path, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    mixture: str = "as_given"
    mixture_unit: Literal["tokens", "samples"] = "tokens"
    mixture_examples: int = 256
    max_tokens: int = 32768  # 16384 in InternVL3's second SFT
    max_tiles: int | None = None
    jpeg: bool = True  # InternVL3.5 report, pre-training and SFT
    increment: float | Literal["random"] = 1.0  # "random" in InternVL3's pre-training
    min_frames: int = 8
    max_frames: int = 32
    max_skipped_share: float = 0.5
    prefetch: int = 2

    def __post_init__(self) -> None:
        """Refuse a ratio that is none."""
        parse_ratio(self.mixture)
        if self.mixture_examples < 1:
            raise ConfigError(
                f"data.mixture_examples is {self.mixture_examples}; look at 1 or more"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """How samples share rows and rows share a micro-batch.

    Attributes:
        packing: ``fill`` packs rows up to a number of tokens and tiles; ``count`` puts a fixed
            number of samples in a row.
        rows: Rows of a micro-batch.
        row_tokens: Most tokens of a row under ``fill``.
        row_tiles: Most tiles of a row under ``fill``.
        buffer_rows: Rows kept open under ``fill``.
        level_rows: Full rows of which the next is chosen under ``fill``, so that every process
            gets tiles in proportion to tokens and none waits for another (`Leveller`).
        fixed_rows: Pad every row to ``row_tokens`` under ``fill``: a compiled model then meets
            one length only.
        row_samples: Samples of a row under ``count``.
        averaging: How the weight of a token falls with the length of its answer.
    """

    packing: Literal["fill", "count"] = "fill"
    rows: int = 1
    row_tokens: int = 32768
    row_tiles: int = 96
    buffer_rows: int = 20
    level_rows: int = 8  # ours: benchmarks/bench_packing.py
    fixed_rows: bool = False
    row_samples: int = 1
    averaging: Averaging = "square"

    def __post_init__(self) -> None:
        """Refuse a length for rows that have none."""
        if self.fixed_rows and self.packing != "fill":
            raise ConfigError(
                f"batch.fixed_rows pads rows to row_tokens, which packing {self.packing!r} does "
                "not heed; use packing fill, or leave it off"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A whole run of pre-training or SFT.

    Attributes:
        model: What is trained.
        data: On what.
        batch: How samples share rows and batches.
        optim: How weights are updated.
        run: How long, and what is left where.
        lora: Train adapters instead of weights; None trains the weights.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    lora: LoraConfig | None = None


def plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON values, to be kept in checkpoints and compared on resuming."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values
