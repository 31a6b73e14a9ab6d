"""A process reward model: a fine-tuned model learns to tell where a solution goes wrong.

InternVL3 report, section 2.5, and VisualPRM (arXiv 2503.10291): solutions as conversations of one
step a turn, each answered with "+" or "-" by what Monte-Carlo continuations say of it. Model class,
rows and loop are those of SFT; a solution is one sample of a row, and all of its steps are targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from rich.console import Console
from torch import Tensor, nn

from cascadevl.data.mixture import WeightedSource
from cascadevl.data.prefetch import Prefetcher
from cascadevl.data.process_records import StepBuilder
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.stream import BatchStream
from cascadevl.errors import ConfigError
from cascadevl.losses.process_reward import (
    LabelTokens,
    LossForm,
    label_nll,
    label_weights,
    process_reward_loss,
)
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.v2pe import dynamic_limit
from cascadevl.train.config import BatchConfig, DataConfig, TrainConfig
from cascadevl.train.loop import RunConfig, TrainState, settled, train
from cascadevl.train.mixing import mixed
from cascadevl.train.objective import Objective, Terms
from cascadevl.train.optim import OptimConfig, Optimiser
from cascadevl.train.run import TrainResult, begin, export, open_log, saver, take_up
from cascadevl.train.sources import collate_config, example_builder, sources_of_meta, stream_of
from cascadevl.train.start import make_trainable, start_from
from cascadevl.types import Batch, ProcessPrompt


@dataclass(frozen=True, kw_only=True, slots=True)
class PRMSection:
    """How labels are learned.

    Attributes:
        form: Over which tokens the probability of a label is taken: the whole ``vocabulary``, or
            the ``two_tokens`` that scores compare.
        minus_weight: How much more than a right step a wrong one counts.
        prompt: What stands around question and steps: the page that is ``released``, or a ``short``
            line, for models to which a page says nothing. It is written into the checkpoint, and
            scores are taken with it.
        before: What stands as the answer to earlier steps: their ``labels``, or ``plus`` for all,
            as it does when scores are taken (docs/decisions/0050).
    """

    form: LossForm = "vocabulary"  # VisualPRM, trained as in SFT
    minus_weight: float = 1.0  # VisualPRM
    prompt: ProcessPrompt = "released"  # VisualPRM
    before: Literal["labels", "plus"] = "labels"  # VisualPRM, trained as in SFT

    def __post_init__(self) -> None:
        """Refuse a weight with which wrong steps would not be learned."""
        if not self.minus_weight > 0:
            raise ConfigError(f"prm.minus_weight is {self.minus_weight}; it must be above 0")


def _data() -> DataConfig:
    return DataConfig(max_tokens=16384, jpeg=False)  # not published; as in the MPO scripts


def _batch() -> BatchConfig:
    return BatchConfig(averaging="token")  # every step alike: VisualPRM names no other


def _optim() -> OptimConfig:
    return OptimConfig(lr=1e-5, warmup_ratio=0.05)  # VisualPRM


def _run() -> RunConfig:
    return RunConfig(num_steps=1000)  # VisualPRM: one epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class PRMConfig(TrainConfig):
    """A run that makes a process reward model. Defaults are VisualPRM's where it names them.

    Attributes:
        prm: How labels are learned.
    """

    data: DataConfig = field(default_factory=_data)
    batch: BatchConfig = field(default_factory=_batch)
    optim: OptimConfig = field(default_factory=_optim)
    run: RunConfig = field(default_factory=_run)
    prm: PRMSection = field(default_factory=PRMSection)


def prm(
    config: PRMConfig,
    *,
    sources: Sequence[WeightedSource] | None = None,
    on_step: Callable[[TrainState[Batch]], None] | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train a model to judge solutions step by step.

    Args:
        config: The run.
        sources: Judged solutions in the released form; the configured meta files if None.
        on_step: Called every ``run.eval_interval`` steps and at the end.
        console: Where progress is shown; standard error if None.

    Raises:
        ConfigError: If the configuration cannot be used.
        TrainingError: If the run breaks, or cannot be taken up again.
    """
    accelerator = begin(config.run.seed)
    run = settled(config.run, rows=config.batch.rows, num_processes=accelerator.num_processes)

    # The model: fine-tuned, whose language head answers "+" or "-".
    if config.model.path is None:
        raise ConfigError(
            "a process reward model starts from a fine-tuned model; name its folder with "
            "--model DIR (model.path)"
        )
    model, processor = start_from(config.model)
    model.config.process_prompt = config.prm.prompt
    make_trainable(model, config.model, accelerator, lora=config.lora, seed=config.run.seed)

    # The data: solutions as conversations, of which the labels alone are targets.
    if sources is None:
        sources = sources_of_meta(config.data.meta)
    with open_steps(sources, processor, config, accelerator, model.config) as (stream, tokens):
        state = TrainState(
            model=model,
            optimiser=Optimiser(model.named_parameters(), config.optim),
            stream=stream,
            accelerator=accelerator,
        )
        take_up(state, config)

        # The objective: cross-entropy of the labels, one normaliser for the whole step.
        objective = process_reward_objective(config.prm, tokens)
        with open_log("prm", config, state, console) as log:
            finished = train(state, run, objective, log=log, save=saver(config), on_step=on_step)
        return export(state, model, processor, config, finished=finished)


@contextmanager
def open_steps(
    sources: Sequence[WeightedSource],
    processor: CascadeVLProcessor,
    config: PRMConfig,
    accelerator: Accelerator,
    model: CascadeVLConfig,
) -> Iterator[tuple[BatchStream[Batch] | Prefetcher[Batch], LabelTokens]]:
    """The judged solutions of one process of a run, and the tokens that they are judged by.

    Args:
        sources: What to draw from.
        processor: The model's processor.
        config: The run's.
        accelerator: Knows which process this is.
        model: The model's configuration.

    Raises:
        ConfigError: If the sources cannot be mixed as configured, or "+" and "-" are no tokens.
    """
    builder = example_builder(
        config.data, processor, config.run.seed, max_positions=dynamic_limit(model)
    )
    build = StepBuilder(builder, config.prm.prompt)
    collate = collate_config(config.batch, processor, model)
    mixture = mixed(sources, builder, config, accelerator)
    with stream_of(mixture, build, collate, config, accelerator) as stream:
        yield stream, build.tokens


def process_reward_objective(section: PRMSection, tokens: LabelTokens) -> Objective[Batch]:
    """What a step minimises: the negative log-likelihood of its labels, weighted.

    Args:
        section: How labels are learned.
        tokens: "+" and "-".
    """

    def labels_and_weights(
        batch: Batch,
    ) -> tuple[Bool[Tensor, " steps"], Float[Tensor, " steps"]]:
        is_plus = batch.target_ids == tokens.plus
        return is_plus, label_weights(batch.target_weights, is_plus, section.minus_weight)

    def weigh(batch: Batch) -> float:
        _, weights = labels_and_weights(batch)
        return float(weights.sum(dtype=torch.float64))

    def loss(model: nn.Module, batch: Batch, weight_sum: float) -> Terms:
        is_plus, weights = labels_and_weights(batch)

        def head(logits: Float[Tensor, "chunk vocab"], where: slice) -> Float[Tensor, " chunk"]:
            return label_nll(logits, is_plus[where], tokens=tokens, form=section.form)

        read = as_scored(batch, tokens) if section.before == "plus" else batch
        nll = model(batch=read, head_fn=head)
        terms = process_reward_loss(nll, is_plus, weights, weight_sum)
        return Terms(
            terms.loss,
            {
                "accuracy": terms.accuracy,
                "minus_share": terms.minus_share,
                "minus_found": terms.minus_found,
            },
        )

    return Objective(weigh=weigh, loss=loss)


def as_scored(batch: Batch, tokens: LabelTokens) -> Batch:
    """The batch as it is read when scores are taken: every label is "+", targets stay.

    Args:
        batch: Judged solutions; the token behind a hidden state that predicts is the label.
        tokens: "+" and "-".
    """
    ids = batch.input_ids.clone()
    labels = batch.target_index + 1
    assert torch.equal(ids.view(-1)[labels], batch.target_ids), "a label follows what predicts it"
    ids.view(-1)[labels] = tokens.plus
    return replace(batch, input_ids=ids)
