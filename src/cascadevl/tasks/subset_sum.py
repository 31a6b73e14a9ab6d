"""Which of these numbers have that sum? Found by search, checked at a glance.

Whoever writes the first number of an answer must know the others already; whoever reads a finished
one only adds them up. So right answers are rare, and are seen to be right: material for best of N
and for judges of steps. A step adds one number, a paragraph a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np
import PIL.Image

from cascadevl.tasks import handwriting
from cascadevl.tasks.base import Question, Scene, Split, check_difficulty, scene_generator
from cascadevl.tasks.chains import totals
from cascadevl.tasks.handwriting import load_scans, render_rows
from cascadevl.tasks.text import is_test_pair

KINDS = ("two", "three", "column")
"""Two numbers of a list; three of them; two numbers of a handwritten column."""

COLUMN = handwriting.Level(
    num_digits=(1, 2), size=(0.2, 0.26), num_rows=4, colour_spread=60, kinds=KINDS
)
"""How the handwritten column looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """How large the search is.

    Attributes:
        largest: Largest number.
        length: Numbers of a list.
    """

    largest: int
    length: int


LEVELS = {"easy": Level(largest=9, length=4), "full": Level(largest=19, length=6)}


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetSum:
    """Numbers to be found by their sum: the kinds take turns from scene to scene.

    All numbers differ, and one choice alone has the sum. Held out are the scans of the handwritten
    digits, and the pair of numbers that an answer begins with.

    Attributes:
        px: Side of the pictures.
        num_questions: Not used; there so that every family is set up alike.
        difficulty: A key of ``LEVELS``.
    """

    px: int = 112
    num_questions: int = 1
    difficulty: str = "full"
    name: ClassVar[str] = "subset_sum"
    kinds: ClassVar[tuple[str, ...]] = KINDS

    def __post_init__(self) -> None:
        """Refuse an unknown difficulty."""
        check_difficulty(self.name, self.difficulty, LEVELS)

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """Draw one list and what is asked about it."""
        level = LEVELS[self.difficulty]
        generator = scene_generator(f"{self.name}/{self.difficulty}", split, seed, index)
        kind = KINDS[index % len(KINDS)]
        numbers, chosen = _draw_numbers(generator, level, split, kind)
        listed, images, read = ", ".join(map(str, numbers)), tuple[PIL.Image.Image, ...](), []
        if kind == "column":
            rows = [str(number) for number in numbers]
            image, _ = render_rows(generator, rows, COLUMN, load_scans(split), self.px)
            images, read = (image,), [listed]
        wanted = "three" if kind == "three" else "two"
        question = Question(
            prompt=f"Which {wanted} of {'the numbers' if read else listed} have the sum "
            f"{sum(chosen)}?",
            answer=", ".join(map(str, chosen)),
            kind=kind,
            metric="list",
            reasoning="\n\n".join([*read, *totals(chosen)]),
        )
        return Scene(
            scene_id=f"{self.name}/{kind}/{self.difficulty}/{split}/{seed}:{index}",
            images=images,
            questions=(question,),
            description="",
        )


def _draw_numbers(
    generator: np.random.Generator, level: Level, split: Split, kind: str
) -> tuple[list[int], list[int]]:
    """A list, and the numbers of it that are asked for, in its order."""
    length = COLUMN.num_rows if kind == "column" else level.length
    size = 3 if kind == "three" else 2
    while True:
        numbers = [int(number) + 1 for number in generator.permutation(level.largest)[:length]]
        places = sorted(generator.permutation(length)[:size])
        chosen = [numbers[place] for place in places]
        if is_test_pair(*chosen[:2]) == (split == "test") and _is_only(chosen, numbers):
            return numbers, chosen


def _is_only(chosen: Sequence[int], numbers: Sequence[int]) -> bool:
    """Whether no other choice of as many has the same sum."""
    found = [each for each in combinations(numbers, len(chosen)) if sum(each) == sum(chosen)]
    return len(found) == 1
