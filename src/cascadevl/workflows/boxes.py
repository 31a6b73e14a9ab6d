"""The boxes recipe: what `make demo` teaches micro, on what, for how long, and what it is asked.

Micro knows coloured shapes by name and place, and never saw a box. It learns to give their boxes
in the released grounding format, while a share of its own SFT mixture keeps what it knew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cascadevl.data.mixture import WeightedSource
from cascadevl.eval.suite import SuiteRow
from cascadevl.tasks.base import TaskSource
from cascadevl.tasks.grounding import Grounding
from cascadevl.train.config import BatchConfig, DataConfig, ModelConfig, TrainConfig
from cascadevl.train.loop import RunConfig
from cascadevl.train.optim import OptimConfig
from cascadevl.workflows import micro

SEED = 5

NUM_STEPS = 480
"""About six minutes on two quiet cores."""

ROW_TOKENS = 4096
"""Most tokens of a step."""

NEW_SHARE = 0.7
"""Draws of the new family; the others rehearse what micro knows."""

WATCHED = (
    *("box of one", "boxes of all"),
    *("numbers", "easy-VQA", "is there", "how many", "words", "additions"),
)
"""Labels of the rows that learning curves are drawn of."""

_BOXES = Grounding(px=micro.TILE_PX, num_questions=4)


def sources(new_share: float = NEW_SHARE) -> list[WeightedSource]:
    """The mixture: boxes, and micro's own SFT mixture in the share that is left.

    Args:
        new_share: Draws of boxes.
    """
    new = TaskSource(task=_BOXES, length=micro.TRAINING_SCENES, seed=SEED, label="boxes")
    kept = micro.sources("sft")
    total = sum(weighted.weight or 0.0 for weighted in kept)
    return [
        WeightedSource(source=new, weight=new_share),
        *(replace(each, weight=(1 - new_share) * (each.weight or 0.0) / total) for each in kept),
    ]


def train_config(out: Path, *, model: str, num_steps: int) -> TrainConfig:
    """The configuration of the fine-tuning.

    Args:
        out: Run folder.
        model: What to start from.
        num_steps: Optimiser steps.
    """
    return TrainConfig(
        model=ModelConfig(path=model),
        # No batches made ahead: on two cores that thread makes torch's two wait for it.
        data=DataConfig(max_tokens=2048, jpeg=True, prefetch=0),
        batch=BatchConfig(
            packing="fill", row_tokens=ROW_TOKENS, row_tiles=256, buffer_rows=8, level_rows=1
        ),
        optim=OptimConfig(
            name="muon",
            # Half of micro's own: at the full rate it forgot far more (docs/experiments.md).
            lr=5e-4,
            muon_lr=2e-3,
            betas=(0.9, 0.95),
            warmup_ratio=0.03,
            schedule="cosine",
            min_lr_ratio=0.02,
        ),
        run=RunConfig(
            num_steps=num_steps,
            seed=SEED,
            out=out,
            resume=True,
            log_interval=5,
            eval_interval=max(1, num_steps // 5),
            checkpoint_interval=100,
            keep_last=1,
        ),
    )


def new_rows(num_questions: int) -> Sequence[SuiteRow]:
    """The held-out questions of the new family; a box counts from an overlap (IoU) of one half.

    Args:
        num_questions: Of each row.
    """
    task = replace(_BOXES, num_questions=9)
    return (
        SuiteRow(
            name="boxes: the one that is named",
            short="box of one",
            task=task,
            num_questions=num_questions,
            keep=lambda question: question.kind == "box",
        ),
        SuiteRow(
            name="boxes: all shapes",
            short="boxes of all",
            task=task,
            num_questions=num_questions,
            keep=lambda question: question.kind == "boxes",
        ),
    )


def suite(num_questions: int) -> Sequence[SuiteRow]:
    """The new family, then everything that micro knew.

    Args:
        num_questions: Of each row.
    """
    return (*new_rows(num_questions), *micro.suite(num_questions))


def curve_suite(num_questions: int) -> Sequence[SuiteRow]:
    """The new family and some of the old ones: what one plot can show.

    Args:
        num_questions: Of each row.
    """
    return tuple(row for row in suite(num_questions) if row.label in WATCHED)
