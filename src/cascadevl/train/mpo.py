"""Mixed preference optimisation: a fine-tuned model learns which of two answers is better.

InternVL3 report, section 2.4, and InternVL3.5 report, the offline stage of Cascade RL: pairs of a
chosen and a rejected answer to one prompt; the model is compared with itself before training, the
reference. What the reference thinks of every pair is computed once and kept in the run folder
(`cascadevl.train.reference`), so that one copy of the weights is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from accelerate import Accelerator
from rich.console import Console

from cascadevl.data.mixture import WeightedSource
from cascadevl.data.pairs import PairBatch, PairBuilder, PairCollate
from cascadevl.data.prefetch import Prefetcher
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.stream import BatchStream
from cascadevl.errors import ConfigError
from cascadevl.losses.mpo import MPOSettings
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.v2pe import dynamic_limit
from cascadevl.train.config import BatchConfig, DataConfig, TrainConfig
from cascadevl.train.loop import RunConfig, TrainState, settled, train
from cascadevl.train.mixing import mixed
from cascadevl.train.mpo_objective import ShiftMemory, mpo_objective
from cascadevl.train.optim import OptimConfig, Optimiser
from cascadevl.train.reference import stored_reference
from cascadevl.train.run import TrainResult, begin, export, open_log, saver, spare_older, take_up
from cascadevl.train.sources import collate_config, example_builder, sources_of_meta, stream_of
from cascadevl.train.start import make_trainable, start_from


@dataclass(frozen=True, kw_only=True, slots=True)
class MPOSection(MPOSettings):
    """How pairs are learned from.

    Attributes:
        update_before_use: Take the rewards of a micro-batch into the reward shift before they are
            compared with it, as the public code does; by default a step uses the mean of those
            before it.
        reference: Where the reference's log-probabilities come from: ``stored`` computes them once
            before training, ``adapters_off`` asks the model again at every step with its adapters
            off (LoRA only; streamed data need it).
        reference_part: Pairs of one file of stored log-probabilities, the unit in which an
            interrupted pass goes on.
    """

    update_before_use: bool = False
    reference: Literal["stored", "adapters_off"] = "stored"
    reference_part: int = 256

    def __post_init__(self) -> None:
        """Refuse values with which no term means anything."""
        weights = (self.preference_weight, self.quality_weight, self.generation_weight)
        if min(weights) < 0 or not any(weights):
            raise ConfigError(
                f"the weights of preference, quality and generation are {weights}; none may be "
                "negative, and one must be above 0"
            )
        if not self.beta > 0:
            raise ConfigError(f"mpo.beta is {self.beta}; it must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"mpo.label_smoothing is {self.label_smoothing}; it is the share of pairs that are "
                "labelled the wrong way round, from 0 to below 0.5"
            )
        if self.preference == "exo_pair" and not self.label_smoothing:
            raise ConfigError(
                "mpo.preference exo_pair compares with smoothed labels; set mpo.label_smoothing "
                "above 0, for example 1e-3"
            )
        if self.reference_part < 1:
            raise ConfigError(f"mpo.reference_part is {self.reference_part}; use 1 or more")


def _data() -> DataConfig:
    return DataConfig(max_tokens=16384, jpeg=False)  # InternVL3.5 MPO scripts; meta file decides


def _batch() -> BatchConfig:
    return BatchConfig(packing="count")  # released MPO scripts do not pack


def _optim() -> OptimConfig:
    return OptimConfig(lr=2e-7)  # MPO scripts of InternVL3 and InternVL3.5


def _run() -> RunConfig:
    return RunConfig(num_steps=1000)  # released scripts: one epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class MPOConfig(TrainConfig):
    """A run of MPO. Defaults are those of the released MPO scripts where they differ from SFT's.

    Attributes:
        mpo: The three terms, and where the reference comes from.
    """

    data: DataConfig = field(default_factory=_data)
    batch: BatchConfig = field(default_factory=_batch)
    optim: OptimConfig = field(default_factory=_optim)
    run: RunConfig = field(default_factory=_run)
    mpo: MPOSection = field(default_factory=MPOSection)

    def __post_init__(self) -> None:
        """Refuse what would have no effect, or could not work."""
        if self.model.drop_path is not None:
            raise ConfigError(
                f"model.drop_path is {self.model.drop_path}, but MPO drops nothing while "
                "log-probabilities are taken; leave it out"
            )
        if self.mpo.reference == "adapters_off" and self.lora is None:
            raise ConfigError(
                "mpo.reference adapters_off needs adapters that can be switched off; add --lora, "
                "or use mpo.reference stored"
            )


def mpo(
    config: MPOConfig,
    *,
    sources: Sequence[WeightedSource] | None = None,
    on_step: Callable[[TrainState[PairBatch]], None] | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train a model on pairs of a chosen and a rejected answer.

    Args:
        config: The run.
        sources: The pairs: records with two branches, the chosen answer first; the configured
            meta files if None.
        on_step: Called every ``run.eval_interval`` steps and at the end.
        console: Where progress is shown; standard error if None.

    Raises:
        ConfigError: If the configuration cannot be used.
        TrainingError: If the run breaks, or cannot be taken up again.
    """
    accelerator = begin(config.run.seed)
    run = settled(config.run, rows=config.batch.rows, num_processes=accelerator.num_processes)
    spare_older(config)

    # The model: fine-tuned. Before its first step it is the reference too.
    if config.model.path is None:
        raise ConfigError(
            "MPO starts from a fine-tuned model; name its folder with --model DIR (model.path)"
        )
    model, processor = start_from(config.model)
    make_trainable(model, config.model, accelerator, lora=config.lora, seed=config.run.seed)

    # The data: pairs, each in one form whatever the epoch, with what the reference thinks of them.
    if sources is None:
        sources = sources_of_meta(config.data.meta)
    with (
        model.no_drop_path(),
        open_pairs(sources, model, processor, config, accelerator, console) as stream,
    ):
        memory = ShiftMemory(before_use=config.mpo.update_before_use)
        state = TrainState(
            model=model,
            optimiser=Optimiser(model.named_parameters(), config.optim),
            stream=stream,
            accelerator=accelerator,
            memory=memory,
        )
        take_up(state, config)

        # The objective: preference, quality and generation, each a mean over a step's pairs.
        objective = mpo_objective(config.mpo, memory, accelerator)
        with open_log("mpo", config, state, console) as log:
            finished = train(state, run, objective, log=log, save=saver(config), on_step=on_step)
        return export(state, model, processor, config, finished=finished)


@contextmanager
def open_pairs(
    sources: Sequence[WeightedSource],
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    config: MPOConfig,
    accelerator: Accelerator,
    console: Console | None,
) -> Iterator[BatchStream[PairBatch] | Prefetcher[PairBatch]]:
    """The pairs of one process of a run.

    Unless they are to be asked for at every step, the reference's log-probabilities are computed
    here, while the model still is the reference, and stored.

    Args:
        sources: The pairs.
        model: The model before its first step.
        processor: Its processor.
        config: The run's.
        accelerator: Device and processes.
        console: Where progress is shown.

    Raises:
        ConfigError: If the sources cannot be mixed, or not be stored.
        TrainingError: If what is stored belongs to another run.
    """
    builder = example_builder(
        config.data, processor, config.run.seed, max_positions=dynamic_limit(model.config)
    )
    build = PairBuilder(builder)
    collate = PairCollate(packed=collate_config(config.batch, processor, model.config))
    if config.mpo.reference == "stored":
        reference = stored_reference(
            model,
            sources,
            build,
            collate,
            config,
            accelerator,
            part_size=config.mpo.reference_part,
            console=console,
        )
        collate = replace(collate, reference=reference)
    mixture = mixed(sources, builder, config, accelerator)
    with stream_of(mixture, build, collate, config, accelerator) as stream:
        yield stream
