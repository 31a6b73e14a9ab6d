"""Calculations of several steps, a paragraph a step, and errors that are planted in them.

Each step adds a number to a running total, or takes it away. A total is written from its first
digit, which depends on carries that nobody has worked out yet; whoever reads the finished step has
all digits before them. So a step is easier to judge than to write, which is what a process reward
needs, and slips of a carry are made alike in many answers, which is what a vote suffers from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cascadevl.tasks.base import Question, Scene, Split, scene_generator
from cascadevl.tasks.handwriting import Level, draw_number, load_scans, render_rows
from cascadevl.tasks.text import draw_pair

KINDS = ("sum", "signs", "column")
"""A list to be added; numbers added and taken away by turns; a column of handwritten numbers."""

COLUMN = Level(num_digits=(1, 2), size=(0.24, 0.32), num_rows=3, colour_spread=60, kinds=KINDS)
"""How the handwritten column looks."""

ERRORS = (-10, -2, -1, 1, 2, 10)
"""By how much a planted total is wrong: a slip of one, or of a carry."""

_TOTAL = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chains:
    """Running totals: a third of the scenes of each kind, one question a scene.

    Held out are the scans of the handwritten digits, and of the questions in text the pair of
    numbers that they begin with.

    Attributes:
        largest: Largest number of a question in text.
        num_terms: Fewest and most numbers of one.
        px: Side of the pictures.
    """

    largest: int
    num_terms: tuple[int, int]
    px: int = 112
    name: ClassVar[str] = "chains"
    kinds: ClassVar[tuple[str, ...]] = KINDS

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """Draw one question; the kinds take turns."""
        generator = scene_generator(f"{self.name}/{self.largest}", split, seed, index)
        kind = KINDS[index % len(KINDS)]
        if kind == "column":
            rows = [draw_number(generator, COLUMN.num_digits) for _ in range(COLUMN.num_rows)]
            image, _ = render_rows(generator, rows, COLUMN, load_scans(split), self.px)
            images, terms, read = (image,), [int(row) for row in rows], [", ".join(rows)]
        else:
            terms = self._terms(generator, split, is_signed=kind == "signs")
            images, read = (), []
        question = Question(
            prompt=prompt_of(kind, terms),
            answer=str(sum(terms)),
            kind=kind,
            reasoning="\n\n".join([*read, *totals(terms)]),
        )
        return Scene(
            scene_id=f"{self.name}/{kind}/{self.largest}/{split}/{seed}:{index}",
            images=images,
            questions=(question,),
            description="",
        )

    def _terms(self, generator: np.random.Generator, split: Split, *, is_signed: bool) -> list[int]:
        """Numbers of which no running total falls below zero."""
        pair = draw_pair(generator, split, (self.largest, self.largest))
        terms = list(pair)
        if is_signed and generator.integers(2):
            terms = [max(pair), -min(pair)]
        fewest, most = self.num_terms
        for _ in range(int(generator.integers(fewest, most + 1)) - 2):
            number = int(generator.integers(self.largest + 1))
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


def truth_of(steps: Sequence[str], reference: Sequence[str]) -> list[bool]:
    """Which steps are right so far: those up to which all is as in the worked solution.

    There is one way to write a running total, so other words are other numbers.

    Args:
        steps: Of an answer.
        reference: Of the worked solution.
    """
    return [list(steps[: n + 1]) == list(reference[: n + 1]) for n in range(len(steps))]


def plant(steps: Sequence[str], rng: np.random.Generator) -> tuple[list[str], list[bool]]:
    """A worked solution with one wrong total, from which everything behind it is calculated.

    Args:
        steps: The solution; its last step is the answer alone.
        rng: Chooses the step, and by how much it is wrong.

    Returns:
        The steps, and which of them are still right.
    """
    places = [number for number, step in enumerate(steps) if _TOTAL.search(step)]
    while True:
        place, by = int(rng.choice(places)), int(rng.choice(ERRORS))
        planted = with_error(steps, place, by)
        if planted is not None:
            return planted, [number < place for number in range(len(steps))]


def with_error(steps: Sequence[str], place: int, by: int) -> list[str] | None:
    """The steps with one total wrong by so much; None if one would fall below zero.

    Args:
        steps: A worked solution; its last step is the answer alone.
        place: The step that is wrong.
        by: How much too large its total is.
    """
    planted, total = list(steps[:place]), -1
    for number, step in enumerate(steps[place:-1], start=place):
        match = _TOTAL.search(step)
        assert match is not None, "behind the first total there are totals only"
        left, right = int(match[1]) if number == place else total, int(match[3])
        total = left + right if match[2] == "+" else left - right
        total += by if number == place else 0
        if total < 0:
            return None
        written = f"{left} {match[2]} {right} = {total}"
        planted.append(f"{step[: match.start()]}{written}{step[match.end() :]}")
    return [*planted, str(total)]
