"""Calculations of several steps, a paragraph a step: lists of numbers, signs, handwritten columns.

Each step adds a number to a running total, or takes it away. A total is written from its first
digit, which depends on carries that nobody has worked out yet, so that a model is right now and
then: material for reinforcement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import PIL.Image

from cascadevl.tasks import handwriting
from cascadevl.tasks.base import Question, Scene, Split, check_difficulty, scene_generator
from cascadevl.tasks.handwriting import draw_number, load_scans, render_rows
from cascadevl.tasks.text import draw_pair

KINDS = ("sum", "signs", "column")
"""A list to be added; numbers added and taken away by turns; a column of handwritten numbers."""

COLUMN = handwriting.Level(
    num_digits=(1, 2), size=(0.24, 0.32), num_rows=3, colour_spread=60, kinds=KINDS
)
"""How the handwritten column looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """How long the chains in text are.

    Attributes:
        largest: Largest number.
        num_terms: Fewest and most numbers.
    """

    largest: int
    num_terms: tuple[int, int]


LEVELS = {
    "easy": Level(largest=99, num_terms=(3, 3)),
    "full": Level(largest=99, num_terms=(3, 5)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chains:
    """Running totals: the kinds take turns from scene to scene, a scene is one question.

    Held out are the scans of the handwritten digits, and of the questions in text the pair of
    numbers that they begin with.

    Attributes:
        px: Side of the pictures.
        num_questions: Not used; there so that every family is set up alike.
        difficulty: A key of ``LEVELS``.
    """

    px: int = 112
    num_questions: int = 1
    difficulty: str = "full"
    name: ClassVar[str] = "chains"
    kinds: ClassVar[tuple[str, ...]] = KINDS

    def __post_init__(self) -> None:
        """Refuse an unknown difficulty."""
        check_difficulty(self.name, self.difficulty, LEVELS)

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """Draw one calculation."""
        level = LEVELS[self.difficulty]
        generator = scene_generator(f"{self.name}/{level.largest}", split, seed, index)
        kind = KINDS[index % len(KINDS)]
        images: tuple[PIL.Image.Image, ...] = ()
        read: list[str] = []
        if kind == "column":
            rows = [draw_number(generator, COLUMN.num_digits) for _ in range(COLUMN.num_rows)]
            image, _ = render_rows(generator, rows, COLUMN, load_scans(split), self.px)
            images, read, terms = (image,), [", ".join(rows)], [int(row) for row in rows]
        else:
            terms = _draw_terms(generator, level, split, is_signed=kind == "signs")
        question = Question(
            prompt=prompt_of(kind, terms),
            answer=str(sum(terms)),
            kind=kind,
            reasoning="\n\n".join([*read, *totals(terms)]),
        )
        return Scene(
            scene_id=f"{self.name}/{kind}/{level.largest}/{split}/{seed}:{index}",
            images=images,
            questions=(question,),
            description="",
        )


def _draw_terms(
    generator: np.random.Generator, level: Level, split: Split, *, is_signed: bool
) -> list[int]:
    """Numbers of which no running total falls below zero."""
    pair = draw_pair(generator, split, (level.largest, level.largest))
    terms = list(pair)
    if is_signed and generator.integers(2):
        terms = [max(pair), -min(pair)]
    fewest, most = level.num_terms
    for _ in range(int(generator.integers(fewest, most + 1)) - 2):
        number = int(generator.integers(level.largest + 1))
        is_taken = is_signed and generator.integers(2) and number <= sum(terms)
        terms.append(-number if is_taken else number)
    return terms


def prompt_of(kind: str, terms: Sequence[int]) -> str:
    """How a question is asked.

    Args:
        kind: One of `KINDS`.
        terms: Its numbers; what is taken away is negative.
    """
    if kind == "column":
        return "What is the sum of the numbers?"
    if kind == "sum":
        return f"What is the sum of {', '.join(map(str, terms))}?"
    return f"What is {terms[0]} {' '.join(f'{_sign(each)} {abs(each)}' for each in terms[1:])}?"


def totals(terms: Sequence[int]) -> list[str]:
    """The running totals, a step each: ``47 + 28 = 75``.

    Args:
        terms: The numbers; what is taken away is negative.
    """
    steps, total = [], terms[0]
    for term in terms[1:]:
        steps.append(f"{total} {_sign(term)} {abs(term)} = {total + term}")
        total += term
    return steps


def _sign(term: int) -> str:
    return "-" if term < 0 else "+"
