"""Supervised fine-tuning: a pre-trained model learns to answer.

InternVL3 report, section 2.3, and InternVL3.5 report: the objective of pre-training, but of
conversations only the answers are learned; square averaging, random JPEG compression and
packing stay. Chat templates decide what an answer is, so the data path marks it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console

from cascadevl.data.mixture import WeightedSource
from cascadevl.errors import ConfigError
from cascadevl.train.config import TrainConfig
from cascadevl.train.loop import TrainState, settled, train
from cascadevl.train.objective import NEXT_TOKEN
from cascadevl.train.optim import Optimiser
from cascadevl.train.run import TrainResult, begin, export, open_log, saver, take_up
from cascadevl.train.sources import open_stream, sources_of_meta
from cascadevl.train.start import make_trainable, start_from
from cascadevl.types import Batch


def sft(
    config: TrainConfig,
    *,
    sources: Sequence[WeightedSource] | None = None,
    on_step: Callable[[TrainState[Batch]], None] | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Fine-tune a model on conversations.

    Args:
        config: The run.
        sources: What to learn from; the configured meta files if None.
        on_step: Called every ``run.eval_interval`` steps and at the end.
        console: Where progress is shown; standard error if None.

    Raises:
        ConfigError: If the configuration cannot be used.
        TrainingError: If the run breaks, or cannot be taken up again.
    """
    accelerator = begin(config.run.seed)
    run = settled(config.run, rows=config.batch.rows, num_processes=accelerator.num_processes)

    # The model: pre-trained, with the parts frozen that the run names.
    if config.model.path is None:
        raise ConfigError(
            "fine-tuning starts from a model; name its folder with --model DIR (model.path), "
            "not a preset"
        )
    model, processor = start_from(config.model)
    make_trainable(model, config.model, accelerator, lora=config.lora, seed=config.run.seed)

    # The data: conversations of which the answers are targets, mixed and packed into rows.
    if sources is None:
        sources = sources_of_meta(config.data.meta)
    with open_stream(sources, processor, config, accelerator, model.config) as stream:
        state = TrainState(
            model=model,
            optimiser=Optimiser(model.named_parameters(), config.optim),
            stream=stream,
            accelerator=accelerator,
        )
        take_up(state, config)

        # The objective: weighted next-token loss on answers, one normaliser for the whole step.
        with open_log("sft", config, state, console) as log:
            finished = train(state, run, NEXT_TOKEN, log=log, save=saver(config), on_step=on_step)
        return export(state, model, processor, config, finished=finished)
