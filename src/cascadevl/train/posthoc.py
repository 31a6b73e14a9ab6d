"""The post-hoc route: the projector first, between two frozen halves, then everything.

What the InternVL3 report calls the usual way (section 2.2) and InternVL2.5 did: a finished vision
tower and a finished language model are joined by a projector that is trained alone on multimodal
data (the warm-up), before everything is trained. Native pre-training leaves the warm-up out. The
recipe is here to be compared with it, and because InternVL3.5's GPT-OSS model was trained so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from cascadevl.data.mixture import WeightedSource
from cascadevl.data.modality import modality_of
from cascadevl.data.ratios import AS_GIVEN
from cascadevl.errors import ConfigError
from cascadevl.train.config import TrainConfig
from cascadevl.train.loop import TrainState
from cascadevl.train.pretrain import pretrain
from cascadevl.train.run import TrainResult
from cascadevl.train.sources import sources_of_meta
from cascadevl.types import Batch

WARMUP = "warmup"
"""Folder of the first stage within the run folder."""

JOINT = "joint"
"""Folder of the second stage within the run folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupConfig:
    """The stage in which the projector alone is trained.

    Attributes:
        num_steps: Optimiser steps.
        lr: Peak learning rate of the projector, under either optimiser.
        global_batch: Rows of a step on all processes together; None keeps the second stage's step.
        max_tokens: Longest sample, and longest row under packing ``fill``; None keeps the second
            stage's.
    """

    num_steps: int = 5000  # stage 0 of the GPT-OSS scripts
    lr: float = 1e-3  # stage 0 of the GPT-OSS scripts; 2e-4 in the InternVL2.5 report
    global_batch: int | None = None  # 256 in stage 0 of the GPT-OSS scripts
    max_tokens: int | None = None  # 16384 in stage 0 of the GPT-OSS scripts

    def __post_init__(self) -> None:
        """Refuse a stage without a step or a rate."""
        if self.num_steps < 1 or not self.lr > 0:
            raise ConfigError(
                f"warmup.num_steps is {self.num_steps} and warmup.lr {self.lr}; both must be "
                "positive. Without a warm-up, use the stage pretrain"
            )
        for name in ("global_batch", "max_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"warmup.{name} is {value}; it must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class PosthocConfig(TrainConfig):
    """Both stages: the keys of a training run describe the second one, and the data of both.

    Attributes:
        warmup: What is different in the first stage.
    """

    warmup: WarmupConfig = field(default_factory=WarmupConfig)


def posthoc(
    config: PosthocConfig,
    *,
    sources: Sequence[WeightedSource] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_step: Callable[[TrainState[Batch]], None] | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train the projector between frozen halves on multimodal data, then everything on all data.

    The stages have run folders of their own, ``warmup`` and ``joint``, in ``run.out``. A run that
    is taken up again goes on in the stage in which it was stopped.

    Args:
        config: Both stages.
        sources: What to learn from; the configured meta files if None.
        tokenizer: Of a preset; the one in the configured folder if None.
        on_step: Called every ``run.eval_interval`` steps and at the end of each stage.
        console: Where progress is shown; standard error if None.

    Returns:
        The result of the second stage; of the first, if it was asked to stop.

    Raises:
        ConfigError: If the configuration cannot be used, or no source shows pictures.
        TrainingError: If a stage breaks, or cannot be taken up again.
    """
    if sources is None:
        sources = sources_of_meta(config.data.meta)
    pictures = [one for one in sources if (one.modality or modality_of(one.source)) == "multimodal"]
    if not pictures:
        raise ConfigError(
            f"the warm-up trains the projector on pictures, and none of the {len(sources)} data "
            "sets has any; add one, or use the stage pretrain"
        )
    result = pretrain(
        warmup_of(config, pictures),
        sources=pictures,
        tokenizer=tokenizer,
        on_step=on_step,
        console=console,
    )
    if result.model_path is None:
        return result
    joint = replace(
        _stage(config),
        model=replace(config.model, path=str(result.model_path), preset=None),
        run=replace(config.run, out=config.run.out / JOINT),
    )
    return pretrain(joint, sources=sources, on_step=on_step, console=console)


def warmup_of(config: PosthocConfig, pictures: Sequence[WeightedSource]) -> TrainConfig:
    """The run of the first stage.

    Args:
        config: Both stages.
        pictures: The multimodal sources; weights are configured for these alone.
    """
    names = {one.source.name for one in pictures}
    weights = {name: weight for name, weight in config.data.weights.items() if name in names}
    data = replace(config.data, weights=weights, mixture=AS_GIVEN)
    batch = config.batch
    if config.warmup.max_tokens is not None:
        data = replace(data, max_tokens=config.warmup.max_tokens)
        batch = replace(batch, row_tokens=config.warmup.max_tokens)
    run = replace(config.run, num_steps=config.warmup.num_steps, out=config.run.out / WARMUP)
    if config.warmup.global_batch is not None:
        run = replace(run, accumulation=None, global_batch=config.warmup.global_batch)
    return replace(
        _stage(config),
        model=replace(config.model, frozen=("vision", "language")),
        data=data,
        batch=batch,
        optim=replace(config.optim, lr=config.warmup.lr, muon_lr=None),
        lora=None,  # the projector starts from nothing; LoRA adapts what is there already
        run=run,
    )


def _stage(config: PosthocConfig) -> TrainConfig:
    """The keys of a single run."""
    return TrainConfig(**{key.name: getattr(config, key.name) for key in fields(TrainConfig)})
