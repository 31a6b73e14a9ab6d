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
from cascadevl.data.tokenizer import build_letter_tokenizer
from cascadevl.eval.suite import SuiteRow, of_kind
from cascadevl.model.loading import load, save
from cascadevl.tasks import charts, letters, printed, text
from cascadevl.tasks.base import DESCRIBE_PROMPT, Question, Task, TaskSource
from cascadevl.tasks.charts import Charts
from cascadevl.tasks.described import Described
from cascadevl.tasks.easy_vqa import EasyVQA
from cascadevl.tasks.grounding import Grounding
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.letters import Letters
from cascadevl.tasks.pages import Pages
from cascadevl.tasks.printed import Printed
from cascadevl.tasks.shapes import Shapes
from cascadevl.tasks.tables import MONTHS
from cascadevl.tasks.text import Text
from cascadevl.tasks.words import FONTS
from cascadevl.train.config import BatchConfig, DataConfig, ModelConfig, TrainConfig
from cascadevl.train.loop import RunConfig
from cascadevl.train.optim import OptimConfig

SEED = 3
SEEDS = {"vision": 0, "reading": 1, "decoder": 3, "pretrain": 4, "sft": 5, "anneal": 6}
"""Seeds of the drawn pages and scenes; no stage sees any that came before."""

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
    "reading": Plan(num_steps=3000, row_tokens=32 * 64, schedule="wsd"),
    "decoder": Plan(num_steps=1600, row_tokens=3072, schedule="wsd"),
    "pretrain": Plan(num_steps=700, row_tokens=4096),
    "sft": Plan(num_steps=1600, row_tokens=4096, schedule="wsd"),
    "anneal": Plan(num_steps=6000, row_tokens=4096, lr=8e-4, schedule="cosine"),
}
"""Every stage by its name, in order; the first two teach the vision tower, the third does not
depend on them."""

VISION_STAGES = ("vision", "reading")
"""The stages on labelled pages."""

PAGES_A_STEP = 32

_DIGITS = Handwriting(px=TILE_PX, difficulty="one", num_questions=3)
_TWO_DIGITS = Handwriting(px=TILE_PX, difficulty="two", num_questions=4)
_NUMBERS = Handwriting(px=TILE_PX, difficulty="four", num_questions=5)
_TWO_ROWS = Handwriting(px=TILE_PX, difficulty="add_digits", num_questions=3)
_SUMS = Handwriting(px=TILE_PX, difficulty="add", num_questions=4)
_FEW_SHAPES = Shapes(px=TILE_PX, difficulty="easy", num_questions=4, worked=True)
_SHAPES = Shapes(px=TILE_PX, difficulty="full", num_questions=6, worked=True)
_EASY_VQA = EasyVQA(px=TILE_PX, num_questions=6)
_SHORT_WORDS = Printed(px=TILE_PX, difficulty="short", num_questions=3, invented=0.5)
_WORDS = Printed(px=TILE_PX, difficulty="word", num_questions=3, invented=0.5)
_LARGE_WORDS = Printed(px=LARGE_PX, difficulty="word", num_questions=3, invented=0.5)
_LINES = Printed(px=LARGE_PX, difficulty="line", num_questions=3, invented=0.5)
_TEXTS = Printed(px=LARGE_PX, difficulty="lines", num_questions=3, invented=0.5)
_EASY_CHARTS = Charts(px=LARGE_PX, difficulty="easy", num_questions=4, worked=True, invented=0.5)
_AXES = Charts(px=LARGE_PX, difficulty="axis", num_questions=4, worked=True, invented=0.5)
_CHARTS = Charts(px=LARGE_PX, difficulty="full", num_questions=4, worked=True, invented=0.5)
_EASY_TEXT = Text(difficulty="easy", num_questions=3)
_TEXT = Text(difficulty="full", num_questions=3)
_LETTERS = Letters(difficulty="word", num_questions=3)
_ROWS_OF_LETTERS = Letters(difficulty="line", num_questions=2)

_MOST = 0.8
"""Share of invented words and charts where they have come often enough to be known by heart."""

_DECODER: tuple[tuple[Task, float], ...] = (
    (_EASY_TEXT, 0.12),
    (_TEXT, 0.24),
    (_LETTERS, 0.06),
    (_ROWS_OF_LETTERS, 0.04),
    (Described(task=_NUMBERS), 0.07),
    (Described(task=_SUMS), 0.15),
    (Described(task=_SHAPES), 0.12),
    (Described(task=_EASY_VQA), 0.02),
    (Described(task=_WORDS), 0.04),
    (Described(task=_TEXTS), 0.04),
    (Described(task=_EASY_CHARTS), 0.03),
    (Described(task=_AXES), 0.03),
    (Described(task=_CHARTS), 0.04),
)
_PRETRAIN: tuple[tuple[Task, float], ...] = (
    (_DIGITS, 0.05),
    (_TWO_DIGITS, 0.09),
    (_NUMBERS, 0.10),
    (_TWO_ROWS, 0.04),
    (_SUMS, 0.08),
    (_FEW_SHAPES, 0.07),
    (_SHAPES, 0.11),
    (_EASY_VQA, 0.06),
    (_SHORT_WORDS, 0.09),
    (_WORDS, 0.12),
    (_LINES, 0.03),
    (_EASY_CHARTS, 0.06),
    (_AXES, 0.05),
    (_CHARTS, 0.02),
    (_TEXT, 0.03),
)
_SFT: tuple[tuple[Task, float], ...] = (
    (_DIGITS, 0.01),
    (_TWO_DIGITS, 0.03),
    (_NUMBERS, 0.11),
    (_TWO_ROWS, 0.02),
    (_SUMS, 0.11),
    (_FEW_SHAPES, 0.02),
    (_SHAPES, 0.12),
    (_EASY_VQA, 0.04),
    (_SHORT_WORDS, 0.04),
    (_WORDS, 0.10),
    (_LARGE_WORDS, 0.10),
    (_LINES, 0.06),
    (_TEXTS, 0.02),
    (_EASY_CHARTS, 0.07),
    (_AXES, 0.08),
    (_CHARTS, 0.05),
    (_TEXT, 0.02),
)
_ANNEAL: tuple[tuple[Task, float], ...] = (
    (_TWO_DIGITS, 0.02),
    (_NUMBERS, 0.09),
    (_SUMS, 0.09),
    (_SHAPES, 0.09),
    (_EASY_VQA, 0.02),
    (replace(_WORDS, invented=_MOST), 0.02),
    (replace(_LARGE_WORDS, invented=_MOST), 0.20),
    (replace(_LINES, invented=_MOST), 0.09),
    (replace(_TEXTS, invented=_MOST), 0.02),
    (replace(_EASY_CHARTS, invented=_MOST), 0.10),
    (replace(_AXES, invented=_MOST), 0.12),
    (replace(_CHARTS, invented=_MOST), 0.12),
    (_TEXT, 0.02),
)
"""More of what was still hard after SFT: words, lines and charts, these with their descriptions."""


def pages(stage: str) -> Pages:
    """The pages of a stage.

    Args:
        stage: One of ``VISION_STAGES``.
    """
    return Pages(px=TILE_PX, seed=SEEDS[stage], tiles=stage == "reading")


def sources(stage: str) -> list[WeightedSource]:
    """The mixture of a stage.

    Args:
        stage: A key of ``STAGES`` that is none of ``VISION_STAGES``.
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
    return stage == "pretrain" or (stage == "anneal" and isinstance(task, Charts))


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words for what questions and fixed answers are made of, letters for everything else.

    What is read off a picture has many words, and the held-out ones are not among those that
    training shows; written letter by letter, a word needs only to be seen.
    """
    return build_letter_tokenizer(_wordings(num_scenes=150), VOCAB_SIZE)


def _wordings(num_scenes: int) -> Iterator[str]:
    """Prompts and fixed answers: no printed word, no label of a chart but the months."""
    tasks: tuple[Task, ...] = (
        *(_NUMBERS, _SUMS, _SHAPES, replace(_EASY_VQA, num_questions=9)),
        Grounding(px=TILE_PX),
    )
    scenes = chain.from_iterable(
        (task.draw("train", SEED, index) for index in range(num_scenes)) for task in tasks
    )
    for scene in scenes:
        yield scene.description
        for question in scene.questions:
            yield f"{question.prompt}\n{question.response()}"
    for family in (charts, letters, printed, text):
        # The gaps are filled with digits, which are tokens of their own.
        yield from (prompts[0].format(1, 2) for prompts in family.PROMPTS.values())
    yield from (*MONTHS, ", ".join(("", *MONTHS)), *charts.FORM_NAMES.values())
    yield from (f"Printed text in a {face} font: " for face in FONTS)
    yield from ("axis to 1 by 1", "Bar chart with axis to 1 by 1")
    yield from (DESCRIBE_PROMPT, THINKING_PROMPT, "Answer: ")


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
            if stage in VISION_STAGES
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
            eval_interval=max(1, num_steps // 4),
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
