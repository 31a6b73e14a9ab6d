"""Handwritten numbers: the UCI digits of scikit-learn, enlarged and set in rows.

1,797 scans of 8 x 8 pixels by 43 writers (UCI "Optical Recognition of Handwritten Digits", test
part). Every fifth scan of each class is the test part: the very images asked about there are
never seen in training. Places and sizes are drawn as shares of the picture, so one scene looks
the same at every picture size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import PIL.Image
from jaxtyping import Float, Int, UInt8

from cascadevl.tasks.arithmetic import addition_steps, sum_steps
from cascadevl.tasks.base import (
    Question,
    Scene,
    Split,
    check_difficulty,
    pick,
    pick_kinds,
    scene_generator,
)

TEST_STRIDE = 5
"""Every fifth image of a class is held out for testing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """How hard the numbers are to read.

    Attributes:
        num_digits: Fewest and most digits of a number.
        size: Smallest and largest height of a digit, as a share of the picture.
        num_rows: Numbers in the picture, one below the other.
        colour_spread: How far ink and paper may be from dark grey and nearly white, 0 to 255.
        kinds: What is asked.
    """

    num_digits: tuple[int, int]
    size: tuple[float, float]
    num_rows: int = 1
    colour_spread: int = 40
    kinds: tuple[str, ...]


LEVELS = {
    "one": Level(num_digits=(1, 1), size=(0.40, 0.80), kinds=("number", "parity")),
    "two": Level(
        num_digits=(1, 2),
        size=(0.38, 0.48),
        kinds=("number", "first_digit", "last_digit", "num_digits"),
    ),
    "four": Level(
        num_digits=(1, 4),
        size=(0.22, 0.32),
        colour_spread=60,
        kinds=(
            "number",
            "first_digit",
            "last_digit",
            "num_digits",
            "digit_sum",
            "largest_digit",
            "parity",
        ),
    ),
    "add_digits": Level(
        num_digits=(1, 1), size=(0.37, 0.45), num_rows=2, kinds=("addition", "upper", "lower")
    ),
    "add": Level(
        num_digits=(1, 3),
        size=(0.24, 0.36),
        num_rows=2,
        colour_spread=60,
        kinds=("addition", "upper", "lower", "larger"),
    ),
}

PROMPTS = {
    "number": ("What number is written?", "Read the number."),
    "first_digit": ("What is the first digit?", "Which digit comes first?"),
    "last_digit": ("What is the last digit?", "Which digit comes last?"),
    "num_digits": ("How many digits are there?", "How many digits does the number have?"),
    "digit_sum": ("What is the sum of the digits?", "Add up the digits."),
    "largest_digit": ("What is the largest digit?", "Which digit is the largest?"),
    "parity": ("Is the number even?", "Can the number be divided by two?"),
    "addition": ("What is the sum of the two numbers?", "Add the two numbers."),
    "upper": ("What is the upper number?", "Read the number at the top."),
    "lower": ("What is the lower number?", "Read the number at the bottom."),
    "larger": ("Which number is larger?", "What is the larger of the two numbers?"),
}


@dataclass(frozen=True, slots=True, eq=False)
class DigitScans:
    """The scans of one part.

    Attributes:
        images: Ink, 0 to 255.
        by_class: Indices of the scans of each digit.
        indices: Place of each scan in scikit-learn's data set.
    """

    images: UInt8[np.ndarray, "scans 8 8"]
    by_class: tuple[tuple[int, ...], ...]
    indices: Int[np.ndarray, " scans"]


@lru_cache(maxsize=2)
def load_scans(split: Split) -> DigitScans:
    """The scans of the training or the test part."""
    from sklearn.datasets import load_digits  # a second to import: only where digits are drawn

    data = load_digits()
    place = np.zeros(len(data.target), dtype=np.int64)
    for digit in range(10):
        members = np.flatnonzero(data.target == digit)
        place[members] = np.arange(len(members))
    is_test = place % TEST_STRIDE == TEST_STRIDE - 1
    indices = np.flatnonzero(is_test if split == "test" else ~is_test)
    targets = data.target[indices]
    return DigitScans(
        images=np.minimum(data.images[indices] * 16, 255).astype(np.uint8),
        by_class=tuple(tuple(np.flatnonzero(targets == digit).tolist()) for digit in range(10)),
        indices=indices,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Handwriting:
    """Numbers of handwritten digits.

    Attributes:
        px: Side of the picture.
        num_questions: At most so many questions a picture, each of another kind.
        difficulty: A key of ``LEVELS``.
        num_phrasings: How many wordings of each question are used.
    """

    px: int = 112
    num_questions: int = 3
    difficulty: str = "two"
    num_phrasings: int = 1
    name: ClassVar[str] = "handwriting"

    def __post_init__(self) -> None:
        """Refuse an unknown difficulty."""
        check_difficulty(self.name, self.difficulty, LEVELS)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of questions asked at this difficulty."""
        return LEVELS[self.difficulty].kinds

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """Draw one picture with its questions."""
        scene, _ = self.draw_placed(split, seed, index)
        return scene

    def draw_placed(self, split: Split, seed: int, index: int) -> tuple[Scene, list[PlacedDigit]]:
        """The same, and which scans stand where: number by number, from left to right."""
        generator = scene_generator(f"{self.name}/{self.difficulty}", split, seed, index)
        level = LEVELS[self.difficulty]
        rows = [draw_number(generator, level.num_digits) for _ in range(level.num_rows)]
        questions = [
            ask(generator, kind, rows, self.num_phrasings)
            for kind in pick_kinds(generator, level.kinds, self.num_questions)
        ]
        image, placed = render_rows(generator, rows, level, load_scans(split), self.px)
        scene = Scene(
            scene_id=f"{self.name}/{self.difficulty}/{self.px}px/{split}/{seed}:{index}",
            images=(image,),
            questions=tuple(questions),
            description=describe(rows),
        )
        return scene, placed


def draw_number(generator: np.random.Generator, num_digits: tuple[int, int]) -> str:
    """A number whose length and digits are uniform; no leading zero unless it is one digit."""
    length = int(generator.integers(num_digits[0], num_digits[1] + 1))
    digits = generator.integers(0, 10, size=length)
    if length > 1:
        digits[0] = generator.integers(1, 10)
    return "".join(str(digit) for digit in digits)


def describe(rows: Sequence[str]) -> str:
    """The dense description: every number digit by digit."""
    spelled = [f"the number {row}, digits {' '.join(row)}" for row in rows]
    if len(rows) == 1:
        return f"A handwritten picture of {spelled[0]}."
    return f"A handwritten picture: at the top {spelled[0]}; at the bottom {spelled[1]}."


def _digit_sum(rows: Sequence[str]) -> tuple[str, str | None]:
    digits = [int(digit) for digit in rows[0]]
    return str(sum(digits)), sum_steps(digits) if len(digits) > 1 else None


_ANSWERS: dict[str, Callable[[Sequence[str]], tuple[str, str | None]]] = {
    "number": lambda rows: (rows[0], None),
    "upper": lambda rows: (rows[0], None),
    "lower": lambda rows: (rows[1], None),
    "larger": lambda rows: (str(max(int(row) for row in rows)), None),
    "first_digit": lambda rows: (rows[0][0], None),
    "last_digit": lambda rows: (rows[0][-1], None),
    "num_digits": lambda rows: (str(len(rows[0])), None),
    "largest_digit": lambda rows: (max(rows[0]), None),
    "parity": lambda rows: ("no" if int(rows[0]) % 2 else "yes", None),
    "digit_sum": _digit_sum,
    "addition": lambda rows: (
        str(int(rows[0]) + int(rows[1])),
        addition_steps(int(rows[0]), int(rows[1])),
    ),
}


def ask(
    generator: np.random.Generator, kind: str, rows: Sequence[str], num_phrasings: int
) -> Question:
    """The question of one kind about these numbers."""
    prompt = pick(generator, PROMPTS[kind][:num_phrasings])
    answer, reasoning = _ANSWERS[kind](rows)
    return Question(prompt=prompt, answer=answer, kind=kind, reasoning=reasoning)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedDigit:
    """Where a digit was drawn.

    Attributes:
        digit: The digit.
        scan: Its scan, an index into the split's scans.
        box_px: x1, y1, x2, y2 in the picture.
    """

    digit: int
    scan: int
    box_px: tuple[int, int, int, int]


def render_rows(
    generator: np.random.Generator,
    rows: Sequence[str],
    level: Level,
    scans: DigitScans,
    px: int,
) -> tuple[PIL.Image.Image, list[PlacedDigit]]:
    """Draw numbers one below the other at a random place, and say where every digit is.

    Args:
        generator: Source of sizes, places, scans and colours.
        rows: The numbers.
        level: Sizes and colours.
        scans: The scans to draw from.
        px: Side of the picture.
    """
    coverage = np.zeros((px, px), dtype=np.float32)
    placed: list[PlacedDigit] = []
    lane = 1.0 / len(rows)  # each number keeps to its own part of the height
    for number, row in enumerate(rows):
        chosen = [pick(generator, scans.by_class[int(digit)]) for digit in row]
        # A long number may have to shrink to fit; 4 % of the side stays free.
        size = min(float(generator.uniform(*level.size)), 0.96 / len(row), 0.96 * lane)
        left = float(generator.uniform(0.02, 0.98 - len(row) * size))
        top = lane * number + float(generator.uniform(0.02 * lane, 0.98 * lane - size))
        for digit, scan in zip(row, chosen, strict=True):
            box = _pixels((left, top, left + size, top + size), px)
            ink = _enlarge(scans.images[scan], box)
            area = coverage[box[1] : box[3], box[0] : box[2]]
            np.maximum(area, ink, out=area)
            placed.append(PlacedDigit(digit=int(digit), scan=scan, box_px=box))
            left += size
    return _colour(generator, coverage, level.colour_spread), placed


def _pixels(box: tuple[float, float, float, float], px: int) -> tuple[int, int, int, int]:
    left, top = round(box[0] * px), round(box[1] * px)
    right = max(left + 1, round(box[2] * px))
    return left, top, min(px, right), min(px, max(top + 1, round(box[3] * px)))


def _enlarge(
    scan: UInt8[np.ndarray, "8 8"], box: tuple[int, int, int, int]
) -> Float[np.ndarray, "height width"]:
    """Smooth enlargement: the grey levels of the scan are what tells strokes apart."""
    size = (box[2] - box[0], box[3] - box[1])
    smooth = PIL.Image.fromarray(scan).resize(size, PIL.Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32) / np.float32(255)


def _colour(
    generator: np.random.Generator, coverage: Float[np.ndarray, "px px"], spread: int
) -> PIL.Image.Image:
    paper = (255 - generator.integers(0, spread + 1, size=3)).astype(np.float32)
    ink = generator.integers(0, 2 * spread + 1, size=3).astype(np.float32)
    pixels = paper + coverage[..., None] * (ink - paper)
    return PIL.Image.fromarray((pixels + 0.5).astype(np.uint8))
