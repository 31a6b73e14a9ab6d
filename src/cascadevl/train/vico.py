"""Visual consistency, stage 1 of ViCO: a model learns to say the same with fewer visual tokens.

InternVL3.5 report, section on ViCO: the whole model is trained on the data of SFT. For each image a
compression is drawn, a quarter or a sixteenth of the patch features, and the model is held to what
the frozen reference, the model that training starts from, says with a quarter. A plain model gets
its second projector here, and a router that stage 2 trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from accelerate import Accelerator
from rich.console import Console

from cascadevl.data.consistency import ConsistencyBatch, ConsistencyCollate
from cascadevl.data.example import ExampleBuilder
from cascadevl.data.mixture import WeightedSource
from cascadevl.data.prefetch import Prefetcher
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.stream import BatchStream
from cascadevl.errors import ConfigError
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.flash import add_flash
from cascadevl.model.flash_start import start_as_mean
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.unread import fill
from cascadevl.model.v2pe import dynamic_limit
from cascadevl.train.config import BatchConfig, TrainConfig
from cascadevl.train.loop import RunConfig, TrainState, settled, train
from cascadevl.train.mixing import mixed
from cascadevl.train.optim import OptimConfig, Optimiser
from cascadevl.train.run import TrainResult, begin, export, open_log, saver, spare_older, take_up
from cascadevl.train.sources import collate_config, example_config, sources_of_meta, stream_of
from cascadevl.train.start import make_trainable, start_from
from cascadevl.train.vico_objective import consistency_objective
from cascadevl.train.vico_reference import Asking, asked, frozen_copy, stored_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ViCOSection:
    """How consistency is learned.

    Attributes:
        compress: Probability that an image is compressed to a sixteenth of its patch features.
        mixed: Probability that the tiles of an image are compressed each by itself instead, with a
            probability that is drawn for the image.
        reference: Where the reference is: ``copy`` keeps a second copy of what is trained (with
            LoRA of the adapters alone), ``stored`` asks it about all records before training.
        top_tokens: Most probable tokens kept of its distribution; all others are one bucket.
        reference_part: Records of one file under ``stored``, the unit in which an interrupted pass
            goes on.
    """

    compress: float = 0.5  # report: xi is drawn from {1/4, 1/16} evenly
    mixed: float = 0.0  # report: all tiles of an image alike; docs/decisions/0053
    reference: Literal["copy", "stored"] = "copy"  # report: an extra frozen model
    top_tokens: int = 256  # ours: docs/decisions/0028
    reference_part: int = 256

    def __post_init__(self) -> None:
        """Refuse values with which nothing is learned."""
        if not 0 < self.compress <= 1:
            raise ConfigError(
                f"vico.compress is {self.compress}; it is the probability that an image is "
                "compressed, above 0 and at most 1"
            )
        if not 0 <= self.mixed <= 1:
            raise ConfigError(f"vico.mixed is {self.mixed}; it is a probability, 0 to 1")
        for name in ("top_tokens", "reference_part"):
            if getattr(self, name) < 1:
                raise ConfigError(f"vico.{name} is {getattr(self, name)}; use 1 or more")

    @property
    def compressed_share(self) -> float:
        """Share of all tiles that are compressed on average."""
        return (1 - self.mixed) * self.compress + self.mixed / 2


def _batch() -> BatchConfig:
    return BatchConfig(averaging="sample")  # report: a mean over the N tokens of a response


def _optim() -> OptimConfig:
    return OptimConfig(lr=2e-5)  # not published; as in InternVL3's second SFT of a finished model


def _run() -> RunConfig:
    return RunConfig(num_steps=1000)  # not published


@dataclass(frozen=True, kw_only=True, slots=True)
class ViCOConfig(TrainConfig):
    """A run of ViCO's first stage. Defaults are the report's, and those of SFT where it is silent.

    Attributes:
        vico: How consistency is learned.
    """

    batch: BatchConfig = field(default_factory=_batch)
    optim: OptimConfig = field(default_factory=_optim)
    run: RunConfig = field(default_factory=_run)
    vico: ViCOSection = field(default_factory=ViCOSection)

    def __post_init__(self) -> None:
        """Refuse what would have no effect."""
        if self.model.drop_path is not None:
            raise ConfigError(
                f"model.drop_path is {self.model.drop_path}, but ViCO drops nothing, because its "
                "loss would measure what was dropped; leave it out"
            )
        if self.model.shard is not None and self.vico.reference != "stored":
            raise ConfigError(
                f"vico.reference {self.vico.reference} is a second model beside the one in "
                f"training, which model.shard {self.model.shard} is to spare; use stored"
            )


def vico(
    config: ViCOConfig,
    *,
    sources: Sequence[WeightedSource] | None = None,
    on_step: Callable[[TrainState[ConsistencyBatch]], None] | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train a model to answer with compressed tiles as it does with full ones.

    Args:
        config: The run.
        sources: What to learn from, as for SFT; the configured meta files if None.
        on_step: Called every ``run.eval_interval`` steps and at the end.
        console: Where progress is shown; standard error if None.

    Raises:
        ConfigError: If the configuration cannot be used.
        TrainingError: If the run breaks, or cannot be taken up again.
    """
    accelerator = begin(config.run.seed)
    run = settled(config.run, rows=config.batch.rows, num_processes=accelerator.num_processes)
    spare_older(config)

    # The model: finished, now with a second projector. Before its first step it is the reference.
    if config.model.path is None:
        raise ConfigError(
            "ViCO starts from a fine-tuned model; name its folder with --model DIR (model.path)"
        )
    model, processor = start_from(config.model)
    make_compressible(model, config)
    make_trainable(model, config.model, accelerator, lora=config.lora, seed=config.run.seed)

    # The data: as in SFT, a compression drawn for each image, with what the reference thinks.
    if sources is None:
        sources = sources_of_meta(config.data.meta)
    with (
        model.no_drop_path(),
        open_samples(sources, model, processor, config, accelerator, console) as stream,
    ):
        objective = consistency_objective(asking(model, config))
        state = TrainState(
            model=model,
            optimiser=Optimiser(model.named_parameters(), config.optim),
            stream=stream,
            accelerator=accelerator,
        )
        take_up(state, config)

        # The objective: the divergence from the reference, a mean over tokens, then over answers.
        with open_log("vico", config, state, console) as log:
            finished = train(state, run, objective, log=log, save=saver(config), on_step=on_step)
        return export(state, model, processor, config, finished=finished)


def make_compressible(model: CascadeVLForConditionalGeneration, config: ViCOConfig) -> None:
    """Give a plain model a second projector and a router; one that has them is left as it is.

    Args:
        model: The model, in place.
        config: The run's.

    Raises:
        ConfigError: If adapters are to be trained and there is nothing yet that they could adapt.
    """
    if model.config.flash_mode:
        return
    if config.lora is not None:
        raise ConfigError(
            "the model has no projector for compressed tiles, which has to be trained as a whole; "
            "train without --lora first, or start from a Flash model"
        )
    fill(model)
    add_flash(model, seed=config.run.seed, num_heads=heads_for(model.config))
    start_as_mean(model)


def heads_for(config: CascadeVLConfig) -> int:
    """Heads of a new router: as many as released ones have, or fewer if the width asks for it."""
    width = int(config.vision_config.hidden_size)
    return next(heads for heads in range(config.flash_heads, 0, -1) if width % heads == 0)


def asking(model: CascadeVLForConditionalGeneration, config: ViCOConfig) -> Asking | None:
    """How the reference is asked at every step; None where it was asked before.

    Args:
        model: The model before its first step, everything frozen that stays.
        config: The run's.
    """
    if config.vico.reference == "stored":
        return None
    reference = frozen_copy(model)
    return lambda batch: asked(reference, batch, config.vico.top_tokens)


@contextmanager
def open_samples(
    sources: Sequence[WeightedSource],
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    config: ViCOConfig,
    accelerator: Accelerator,
    console: Console | None,
) -> Iterator[BatchStream[ConsistencyBatch] | Prefetcher[ConsistencyBatch]]:
    """The samples of one process of a run.

    Where the reference is stored, it is asked here, while the model still is the reference.

    Args:
        sources: What to draw from.
        model: The model before its first step.
        processor: Its processor.
        config: The run's.
        accelerator: Device and processes.
        console: Where progress is shown.

    Raises:
        ConfigError: If the sources cannot be mixed, or not be stored.
        TrainingError: If what is stored belongs to another run.
    """
    build = sample_builder(config, processor, model.config)
    collate = ConsistencyCollate(packed=collate_config(config.batch, processor, model.config))
    if config.vico.reference == "stored":
        known = stored_tokens(
            model,
            sources,
            build,
            collate,
            config,
            accelerator,
            k=config.vico.top_tokens,
            part_size=config.vico.reference_part,
            console=console,
        )
        collate = replace(collate, known=known)
    mixture = mixed(sources, build, config, accelerator)
    with stream_of(mixture, build, collate, config, accelerator) as stream:
        yield stream


def sample_builder(
    config: ViCOConfig, processor: CascadeVLProcessor, model: CascadeVLConfig
) -> ExampleBuilder:
    """What makes the samples of a run.

    The compression of an image is a function of seed, record and epoch; its tiles, increment and
    JPEG quality are one for all epochs, because the reference saw them so.

    Args:
        config: The run's.
        processor: The model's processor.
        model: The model's configuration.
    """
    settings = replace(
        example_config(config.data, processor, config.run.seed),
        max_positions=dynamic_limit(model),
        compress=config.vico.compress,
        mixed=config.vico.mixed,
        one_form=True,
    )
    return ExampleBuilder(
        processor.tokenizer,
        settings,
        processor.tokens_per_tile,
        compressed_tokens=model.compressed_tokens,
    )
