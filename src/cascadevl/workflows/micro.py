"""The micro recipe: the model that is shipped, from random weights to SFT.

As in the reports both halves start from weights of their own: a vision tower that has learned what
stands in every patch of a page, and a decoder that has learned to calculate, to spell and to answer
questions about pictures told in words. Then native pre-training of the whole, and SFT. Two families
are left out on purpose, so that fine-tuning has something new to teach: boxes (`Grounding`) and
needles among many pictures (`Needle`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from cascadevl.data.mixture import WeightedSource
from cascadevl.data.prompts import THINKING_PROMPT
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.eval.suite import SuiteRow, of_kind
from cascadevl.model.loading import load, save
from cascadevl.tasks import printed, text
from cascadevl.tasks.base import Question, Task, TaskSource
from cascadevl.tasks.charts import Charts
from cascadevl.tasks.described import Described
from cascadevl.tasks.easy_vqa import EasyVQA
from cascadevl.tasks.grounding import Grounding
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.printed import Printed
from cascadevl.tasks.shapes import Shapes
from cascadevl.tasks.text import Text, spelled
from cascadevl.train.config import BatchConfig, DataConfig, ModelConfig, TrainConfig
from cascadevl.train.loop import RunConfig
from cascadevl.train.optim import OptimConfig

SEED = 3
SEEDS = {"decoder": 3, "pretrain": 3, "sft": 3, "anneal": 4}
"""Seeds of the drawn scenes; the last stage sees none that came before."""

VOCAB_SIZE = 1024
TRAINING_SCENES = 10_000_000
"""Scenes of a drawn family; more than any run visits, so that none comes twice."""

TILE_PX = 112
LARGE_PX = 224
"""Side of pictures with small print: four tiles and a thumbnail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long a stage is, and how large its steps are.

    Attributes:
        num_steps: Optimiser steps.
        row_tokens: Tokens of a step.
        lr: Peak learning rate under AdamW; the matrices' under Muon is four times it.
        schedule: How the rate ends.
    """

    num_steps: int
    row_tokens: int
    lr: float = 1e-3
    schedule: str = "constant"


STAGES = {
    "vision": Plan(num_steps=5000, row_tokens=32 * 64, schedule="wsd"),
    "decoder": Plan(num_steps=2000, row_tokens=3072),
    "pretrain": Plan(num_steps=600, row_tokens=4096),
    "sft": Plan(num_steps=1200, row_tokens=4096),
    "anneal": Plan(num_steps=3000, row_tokens=4096, lr=8e-4, schedule="cosine"),
}
"""Every stage by its name, in order; vision and decoder do not depend on each other."""

PAGES_A_STEP = 32

_DIGITS = Handwriting(px=TILE_PX, difficulty="one", num_questions=3)
_TWO_DIGITS = Handwriting(px=TILE_PX, difficulty="two", num_questions=4)
_NUMBERS = Handwriting(px=TILE_PX, difficulty="four", num_questions=5)
_TWO_ROWS = Handwriting(px=TILE_PX, difficulty="add_digits", num_questions=3)
_SUMS = Handwriting(px=TILE_PX, difficulty="add", num_questions=4)
_FEW_SHAPES = Shapes(px=TILE_PX, difficulty="easy", num_questions=4)
_SHAPES = Shapes(px=TILE_PX, difficulty="full", num_questions=6)
_EASY_VQA = EasyVQA(px=TILE_PX, num_questions=6)
_SHORT_WORDS = Printed(px=TILE_PX, difficulty="short", num_questions=4)
_WORDS = Printed(px=TILE_PX, difficulty="word", num_questions=4)
_LARGE_WORDS = Printed(px=LARGE_PX, difficulty="word", num_questions=4)
_LINES = Printed(px=LARGE_PX, difficulty="line", num_questions=4)
_TEXTS = Printed(px=LARGE_PX, difficulty="lines", num_questions=4)
_EASY_CHARTS = Charts(px=LARGE_PX, difficulty="easy", num_questions=5)
_AXES = Charts(px=LARGE_PX, difficulty="axis", num_questions=5)
_CHARTS = Charts(px=LARGE_PX, difficulty="full", num_questions=5)
_EASY_TEXT = Text(difficulty="easy", num_questions=3)
_TEXT = Text(difficulty="full", num_questions=3)

_DECODER: tuple[tuple[Task, float], ...] = (
    (_EASY_TEXT, 0.15),
    (_TEXT, 0.35),
    (Described(task=_NUMBERS), 0.08),
    (Described(task=_SUMS), 0.16),
    (Described(task=_SHAPES), 0.10),
    (Described(task=_EASY_VQA), 0.02),
    (Described(task=_WORDS), 0.05),
    (Described(task=_TEXTS), 0.03),
    (Described(task=_CHARTS), 0.06),
)
_PRETRAIN: tuple[tuple[Task, float], ...] = (
    (_DIGITS, 0.06),
    (_TWO_DIGITS, 0.12),
    (_NUMBERS, 0.12),
    (_TWO_ROWS, 0.06),
    (_SUMS, 0.08),
    (_FEW_SHAPES, 0.10),
    (_SHAPES, 0.12),
    (_EASY_VQA, 0.08),
    (_SHORT_WORDS, 0.06),
    (_WORDS, 0.12),
    (_LINES, 0.03),
    (_EASY_CHARTS, 0.05),
    (_AXES, 0.03),
    (_CHARTS, 0.03),
    (_TEXT, 0.06),
)
_SFT: tuple[tuple[Task, float], ...] = (
    (_DIGITS, 0.02),
    (_TWO_DIGITS, 0.05),
    (_NUMBERS, 0.14),
    (_TWO_ROWS, 0.03),
    (_SUMS, 0.12),
    (_FEW_SHAPES, 0.02),
    (_SHAPES, 0.15),
    (_EASY_VQA, 0.05),
    (_SHORT_WORDS, 0.08),
    (_LARGE_WORDS, 0.12),
    (_LINES, 0.03),
    (_TEXTS, 0.01),
    (_EASY_CHARTS, 0.06),
    (_AXES, 0.05),
    (_CHARTS, 0.05),
    (_TEXT, 0.04),
)
_ANNEAL: tuple[tuple[Task, float], ...] = (
    (_DIGITS, 0.01),
    (_TWO_DIGITS, 0.03),
    (_NUMBERS, 0.12),
    (_TWO_ROWS, 0.02),
    (_SUMS, 0.11),
    (_SHAPES, 0.12),
    (_EASY_VQA, 0.03),
    (_SHORT_WORDS, 0.08),
    (_LARGE_WORDS, 0.18),
    (_LINES, 0.04),
    (_TEXTS, 0.01),
    (_EASY_CHARTS, 0.10),
    (_AXES, 0.06),
    (_CHARTS, 0.06),
    (_TEXT, 0.03),
)
"""More of what was still hard after SFT: words and charts, with their descriptions."""

_DESCRIBED_IN_ANNEAL = (Printed, Charts)


def sources(stage: str) -> list[WeightedSource]:
    """The mixture of a stage.

    Args:
        stage: A key of ``STAGES`` other than ``"vision"``.
    """
    shares = {"decoder": _DECODER, "pretrain": _PRETRAIN, "sft": _SFT, "anneal": _ANNEAL}[stage]
    return [
        WeightedSource(
            source=TaskSource(
                task=task,
                length=TRAINING_SCENES,
                seed=SEEDS[stage],
                stage="pretrain" if _is_described(stage, task) else "sft",
                label=f"{task.name} {getattr(task, 'difficulty', '')} {number}".strip(),
            ),
            weight=weight,
        )
        for number, (task, weight) in enumerate(shares)
    ]


def _is_described(stage: str, task: Task) -> bool:
    """Whether a picture's dense description is learned beside the answers."""
    return stage == "pretrain" or (stage == "anneal" and isinstance(task, _DESCRIBED_IN_ANNEAL))


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of everything but the printed words.

    Words are left out, so that those of the test part are written in the same small pieces as
    those of the training part: reading them is then a matter of seeing.
    """
    return build_tokenizer(_texts(num_scenes=600), VOCAB_SIZE)


def _texts(num_scenes: int) -> Iterator[str]:
    tasks: tuple[Task, ...] = (
        *(_NUMBERS, _SUMS, _SHAPES, replace(_EASY_VQA, num_questions=9)),
        *(_CHARTS, _AXES, Grounding(px=TILE_PX)),
    )
    scenes = chain.from_iterable(
        (task.draw("train", SEED, index) for index in range(num_scenes)) for task in tasks
    )
    for scene in scenes:
        yield scene.description
        for question in scene.questions:
            yield f"{question.prompt}\n{question.response()}"
    letters = spelled("abcdefghijklmnopqrstuvwxyz")
    prompts = [*printed.PROMPTS.values(), *text.PROMPTS.values()]
    for phrase in (THINKING_PROMPT, letters, *(prompt for each in prompts for prompt in each[:1])):
        # A word counts once it is frequent: these stand as often as any question.
        yield from [phrase] * num_scenes


def stage_config(
    stage: str, out: Path, *, model: Path | None, steps_scale: float = 1.0
) -> TrainConfig:
    """The configuration of one stage.

    Args:
        stage: A key of ``STAGES``.
        out: Run folder.
        model: The model to go on with; None to start from random weights.
        steps_scale: Factor on the number of steps.
    """
    plan = STAGES[stage]
    num_steps = max(2, round(plan.num_steps * steps_scale))
    return TrainConfig(
        model=ModelConfig(
            path=None if model is None else str(model), preset="micro" if model is None else None
        ),
        data=DataConfig(max_tokens=2048, jpeg=True, prefetch=0),
        batch=(
            BatchConfig(packing="count", row_samples=PAGES_A_STEP)
            if stage == "vision"
            else BatchConfig(
                packing="fill",
                row_tokens=plan.row_tokens,
                row_tiles=256,
                buffer_rows=8,
                level_rows=1,
                fixed_rows=True,  # so that the bodies can be compiled
            )
        ),
        optim=OptimConfig(
            name="muon",
            lr=plan.lr,
            muon_lr=4 * plan.lr,
            betas=(0.9, 0.95),
            warmup_ratio=0.02,
            schedule=plan.schedule,  # type: ignore[arg-type]
            min_lr_ratio=0.01,
        ),
        run=RunConfig(
            num_steps=num_steps,
            seed=SEED,
            out=out,
            resume=True,
            log_interval=20,
            eval_interval=max(1, num_steps // 5),
            checkpoint_interval=100,
            keep_last=1,
        ),
    )


def join_halves(decoder: Path, vision: Path, out: Path) -> Path:
    """Put the trained vision tower of one model into another and save the whole.

    Args:
        decoder: The model whose language half, tokenizer and settings are kept.
        vision: The model whose vision tower is taken.
        out: Where the whole is written.

    Returns:
        ``out``.
    """
    model, processor = load(decoder)
    tower, _ = load(vision)
    model.model.vision_tower.load_state_dict(tower.model.vision_tower.state_dict())
    save(model, processor, out)
    return out


def suite(num_questions: int) -> Sequence[SuiteRow]:
    """The held-out questions, as rows of the report.

    Args:
        num_questions: Of each row.
    """
    shapes = replace(_SHAPES, num_questions=8)
    rows: tuple[tuple[str, str, Task, Callable[[Question], bool]], ...] = (
        ("handwritten numbers of 1 to 4 digits", "numbers", _all(_NUMBERS), of_kind("number")),
        ("easy-VQA, its own test part", "easy-VQA", _EASY_VQA, lambda question: True),
        ("shapes: is there ...?", "is there", shapes, of_kind("existence")),
        ("shapes: how many?", "how many", shapes, of_kind("count")),
        ("shapes: how many of one color or shape?", "how many of", shapes, _COUNT_OF),
        ("shapes: which color, which shape, where?", "which, where", shapes, _ABOUT_ONE),
        ("shapes: list all with their places", "list all", shapes, of_kind("list")),
        ("printed words", "words", _all(_LARGE_WORDS), of_kind("word")),
        ("printed lines", "lines", _all(_LINES), of_kind("line")),
        ("charts, values printed: value", "printed value", _all(_EASY_CHARTS), of_kind("value")),
        ("charts, values from the axis: value", "axis value", _all(_AXES), of_kind("value")),
        ("charts of all forms: value", "chart value", _all(_CHARTS), of_kind("value")),
        ("handwritten additions, with steps", "additions", _all(_SUMS), of_kind("addition")),
        ("additions in text, with steps", "text sums", _all(_TEXT), of_kind("add")),
    )
    return tuple(
        SuiteRow(name=name, short=short, task=task, num_questions=num_questions, keep=keep)
        for name, short, task, keep in rows
    )


_COUNT_OF = of_kind("count_color", "count_shape")
_ABOUT_ONE = of_kind("color", "shape", "place")


def _all(task: Handwriting | Printed | Charts | Text) -> Task:
    """The family with every kind of question asked of each picture."""
    return replace(task, num_questions=len(task.kinds))
