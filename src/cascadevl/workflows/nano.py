"""The nano recipe: what `make nano` trains, on what, for how long, and what it is asked.

Two stages, as in the reports: pre-training on pictures with dense descriptions and questions,
then SFT on questions alone. Easy comes before hard: one large digit before two, four shapes of
three kinds before six of four. Steps and sizes are fixed, so the run is the same everywhere; only
its duration depends on the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from cascadevl.data.mixture import WeightedSource
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.eval.suite import SuiteRow, of_kind
from cascadevl.tasks.base import Stage, Task, TaskSource
from cascadevl.tasks.easy_vqa import EasyVQA
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.shapes import Shapes
from cascadevl.train.config import BatchConfig, DataConfig, ModelConfig, TrainConfig
from cascadevl.train.loop import RunConfig
from cascadevl.train.optim import OptimConfig

SEED = 1
VOCAB_SIZE = 1024
TRAINING_SCENES = 1_000_000
"""Scenes of a drawn family; more than any run visits, so that none comes twice."""

PRETRAIN_STEPS = 600
SFT_STEPS = 900


def _source(label: str, task: Task, weight: float, stage: Stage) -> WeightedSource:
    source = TaskSource(task=task, length=TRAINING_SCENES, seed=SEED, stage=stage, label=label)
    return WeightedSource(source=source, weight=weight)


def pretrain_sources() -> list[WeightedSource]:
    """The mixture of the first stage: large digits and few shapes, each with its description."""
    return [
        _source("one digit", Handwriting(difficulty="one", num_questions=3), 0.25, "pretrain"),
        _source("two digits", Handwriting(difficulty="two", num_questions=3), 0.25, "pretrain"),
        _source("few shapes", Shapes(difficulty="easy", num_questions=4), 0.35, "pretrain"),
        _source("easy-VQA", EasyVQA(num_questions=4), 0.15, "pretrain"),
    ]


def sft_sources() -> list[WeightedSource]:
    """The mixture of the second stage: questions alone, more of what is harder."""
    return [
        _source("one digit", Handwriting(difficulty="one", num_questions=2), 0.08, "sft"),
        _source("two digits", Handwriting(difficulty="two", num_questions=4), 0.32, "sft"),
        _source("few shapes", Shapes(difficulty="easy", num_questions=4), 0.15, "sft"),
        _source("shapes", Shapes(difficulty="full", num_questions=5), 0.30, "sft"),
        _source("easy-VQA", EasyVQA(num_questions=5), 0.15, "sft"),
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of the words that occur in the three families."""
    return build_tokenizer(_texts(num_scenes=400), VOCAB_SIZE)


def _texts(num_scenes: int) -> Iterator[str]:
    tasks: tuple[Task, ...] = (
        Handwriting(difficulty="one", num_questions=9),
        Handwriting(difficulty="two", num_questions=9),
        Shapes(difficulty="full", num_questions=9),
        EasyVQA(num_questions=9),
    )
    scenes = chain.from_iterable(
        (task.draw("train", SEED, index) for index in range(num_scenes)) for task in tasks
    )
    for scene in scenes:
        yield scene.description
        for question in scene.questions:
            yield f"{question.prompt}\n{question.response()}"


def stage_config(stage: str, out: Path, *, num_steps: int, model: Path | None) -> TrainConfig:
    """The configuration of one stage.

    Args:
        stage: ``"pretrain"`` or ``"sft"``.
        out: Run folder.
        num_steps: Optimiser steps.
        model: The model to go on with; None to start from random weights.
    """
    is_first = stage == "pretrain"
    return TrainConfig(
        model=ModelConfig(
            path=None if model is None else str(model), preset="nano" if model is None else None
        ),
        # No batches made ahead: on two cores that thread makes torch's two wait for it.
        data=DataConfig(max_tokens=2048, jpeg=True, prefetch=0),
        # Under Muon 32 pictures a step learned more in the same time than 16.
        batch=BatchConfig(packing="count", row_samples=32),
        optim=OptimConfig(
            name="muon",
            lr=1e-3,
            muon_lr=4e-3,
            betas=(0.9, 0.95),
            warmup_ratio=0.03,
            schedule="constant" if is_first else "cosine",
            min_lr_ratio=0.02,
        ),
        run=RunConfig(
            num_steps=num_steps,
            seed=SEED,
            out=out,
            resume=True,
            log_interval=10,
            eval_interval=max(1, num_steps // 6),
            checkpoint_interval=200,
            keep_last=1,
        ),
    )


def suite(num_questions: int) -> Sequence[SuiteRow]:
    """The held-out questions, as rows of the report.

    Args:
        num_questions: Of each row.
    """
    shapes = Shapes(difficulty="full", num_questions=8)
    return (
        SuiteRow(
            name="handwritten numbers of one digit",
            short="one digit",
            task=Handwriting(difficulty="one", num_questions=3),
            num_questions=num_questions,
            keep=of_kind("number"),
        ),
        SuiteRow(
            name="handwritten numbers of two digits",
            short="two digits",
            task=Handwriting(difficulty="two"),
            num_questions=num_questions,
            keep=lambda question: question.kind == "number" and len(question.answer) == 2,
        ),
        SuiteRow(
            name="shapes: how many?",
            short="how many",
            task=shapes,
            num_questions=num_questions,
            keep=of_kind("count"),
        ),
        SuiteRow(
            name="shapes: is there ...?",
            short="is there",
            task=shapes,
            num_questions=num_questions,
            keep=of_kind("existence"),
        ),
        SuiteRow(
            name="shapes: how many of one color or shape?",
            short="how many of",
            task=shapes,
            num_questions=num_questions,
            keep=of_kind("count_color", "count_shape"),
        ),
        SuiteRow(
            name="shapes: which color, which shape, where?",
            short="which, where",
            task=shapes,
            num_questions=num_questions,
            keep=of_kind("color", "shape", "place"),
        ),
        SuiteRow(
            name="shapes: list all with their places",
            short="list all",
            task=shapes,
            num_questions=num_questions,
            keep=of_kind("list"),
        ),
        SuiteRow(
            name="easy-VQA, its own test part",
            short="easy-VQA",
            task=EasyVQA(),
            num_questions=num_questions,
        ),
    )
