"""Native multimodal pre-training: vision tower, projector and language model learn together.

InternVL3 report, section 2.2: one stage in which text-only and multimodal samples are mixed and
every parameter is trained on the text tokens alone,
``theta* = argmin E_{x in D_multi} [ -sum_{x_i in text} w_i log p(x_i | x_<i) ]``,
with square averaging and an increment drawn for every image (V2PE, section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from cascadevl.data.mixture import WeightedSource
from cascadevl.errors import ConfigError
from cascadevl.train.config import TrainConfig
from cascadevl.train.loop import TrainState, settled, train
from cascadevl.train.objective import NEXT_TOKEN
from cascadevl.train.optim import Optimiser
from cascadevl.train.run import TrainResult, begin, export, open_log, saver, take_up
from cascadevl.train.sources import open_stream, sources_of_meta
from cascadevl.train.start import from_scratch, make_trainable, start_from
from cascadevl.types import Batch


def pretrain(
    config: TrainConfig,
    *,
    sources: Sequence[WeightedSource] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_step: Callable[[TrainState[Batch]], None] | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Pre-train a preset from random weights, or go on with a given model.

    Args:
        config: The run.
        sources: What to learn from; the configured meta files if None.
        tokenizer: Of a preset; the one in the configured folder if None.
        on_step: Called every ``run.eval_interval`` steps and at the end.
        console: Where progress is shown; standard error if None.

    Raises:
        ConfigError: If the configuration cannot be used.
        TrainingError: If the run breaks, or cannot be taken up again.
    """
    accelerator = begin(config.run.seed)
    run = settled(config.run, rows=config.batch.rows, num_processes=accelerator.num_processes)

    # The model: random weights of a preset, or pre-trained halves joined before.
    if config.model.preset is not None:
        model, processor = from_scratch(config.model, tokenizer, seed=config.run.seed)
    elif config.model.path is not None:
        model, processor = start_from(config.model)
    else:
        raise ConfigError(
            "pre-training needs a start: name the folder of a model, of which the projector may "
            "be untrained, with --model DIR (model.path), or a small shape with model.preset"
        )
    make_trainable(model, config.model, accelerator, lora=config.lora, seed=config.run.seed)

    # The data: text-only and multimodal sources mixed by their weights, packed into rows.
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

        # The objective: weighted next-token loss on text, one normaliser for the whole step.
        with open_log("pretrain", config, state, console) as log:
            finished = train(state, run, NEXT_TOKEN, log=log, save=saver(config), on_step=on_step)
        return export(state, model, processor, config, finished=finished)
