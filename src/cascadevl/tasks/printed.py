"""Printed words and lines, in thirteen fonts.

Words of the test part (`cascadevl.tasks.words`) never occur in a training picture. Sizes are
shares of the picture's height, and a line that would be too wide is drawn smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import PIL.Image
import PIL.ImageDraw

from cascadevl.tasks.base import (
    Question,
    Scene,
    Split,
    check_difficulty,
    pick,
    pick_kinds,
    scene_generator,
)
from cascadevl.tasks.text import spelled
from cascadevl.tasks.words import FONTS, font, invent_word, words_of_length

_MEASURED_PX = 100
"""Text is measured at this size and scaled, so that one font object serves every word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """How much there is to read, and how small it is.

    Attributes:
        num_lines: Fewest and most lines.
        num_words: Fewest and most words a line.
        letters: Fewest and most letters of a word.
        size: Smallest and largest font size, as a share of the picture's height.
        colour_spread: How far ink and paper may be from black and white, 0 to 255.
        kinds: What is asked.
    """

    num_lines: tuple[int, int]
    num_words: tuple[int, int]
    letters: tuple[int, int]
    size: tuple[float, float]
    colour_spread: int = 60
    kinds: tuple[str, ...]


_WORD_KINDS = ("word", "num_letters", "first_letter", "last_letter", "spell")
_LINE_KINDS = ("line", "num_words", "first_word", "last_word", "nth_word")
LEVELS = {
    "short": Level(
        num_lines=(1, 1), num_words=(1, 1), letters=(3, 4), size=(0.26, 0.36), kinds=_WORD_KINDS
    ),
    "word": Level(
        num_lines=(1, 1), num_words=(1, 1), letters=(3, 8), size=(0.16, 0.26), kinds=_WORD_KINDS
    ),
    "line": Level(
        num_lines=(1, 1), num_words=(2, 3), letters=(3, 6), size=(0.11, 0.15), kinds=_LINE_KINDS
    ),
    "lines": Level(
        num_lines=(2, 3),
        num_words=(1, 3),
        letters=(3, 8),
        size=(0.09, 0.13),
        kinds=("nth_line", "num_lines", "num_words", "first_word", "last_word", "all_lines"),
    ),
}

PROMPTS = {
    "word": ("What word is written?", "Read the word."),
    "num_letters": ("How many letters has the word?", "Count the letters."),
    "first_letter": ("What is the first letter?", "Which letter comes first?"),
    "last_letter": ("What is the last letter?", "Which letter comes last?"),
    "spell": ("Spell the word.", "Write the word letter by letter."),
    "line": ("What is written?", "Read the line."),
    "num_words": ("How many words are there?", "Count the words."),
    "first_word": ("What is the first word?", "Which word comes first?"),
    "last_word": ("What is the last word?", "Which word comes last?"),
    "nth_word": ("What is word number {}?", "Read word number {}."),
    "num_lines": ("How many lines are there?", "Count the lines."),
    "nth_line": ("What is written in line {}?", "Read line {}."),
    "all_lines": ("What is written?", "Read the text."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Printed:
    """Printed text.

    Attributes:
        px: Side of the picture. Words are readable from 112 px on, lines from 224.
        num_questions: At most so many questions a picture, each of another kind.
        difficulty: A key of ``LEVELS``.
        num_phrasings: How many wordings of each question are used.
        invented: Share of the words in training pictures that are no words, so that reading does
            not become guessing. Test pictures show real words alone.
    """

    px: int = 112
    num_questions: int = 3
    difficulty: str = "word"
    num_phrasings: int = 1
    invented: float = 0.0
    name: ClassVar[str] = "printed"

    def __post_init__(self) -> None:
        """Refuse an unknown difficulty."""
        check_difficulty(self.name, self.difficulty, LEVELS)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of questions asked at this difficulty."""
        return LEVELS[self.difficulty].kinds

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """Draw one picture with its questions."""
        generator = scene_generator(f"{self.name}/{self.difficulty}", split, seed, index)
        level = LEVELS[self.difficulty]
        lines = draw_lines(generator, level, split, self.invented)
        questions = [
            ask(generator, kind, lines, self.num_phrasings)
            for kind in pick_kinds(generator, level.kinds, self.num_questions)
        ]
        face = pick(generator, tuple(FONTS))
        text = "; ".join(" ".join(line) for line in lines)
        return Scene(
            scene_id=f"{self.name}/{self.difficulty}/{self.px}px/{split}/{seed}:{index}",
            images=(render(generator, [" ".join(line) for line in lines], face, level, self.px),),
            questions=tuple(questions),
            description=f"Printed text in a {face} font: {text}",
        )


def draw_lines(
    generator: np.random.Generator, level: Level, split: Split, invented: float = 0.0
) -> list[list[str]]:
    """The words of every line; word lengths are uniform."""
    lines = []
    for _ in range(int(generator.integers(level.num_lines[0], level.num_lines[1] + 1))):
        count = int(generator.integers(level.num_words[0], level.num_words[1] + 1))
        lengths = generator.integers(level.letters[0], level.letters[1] + 1, size=count).tolist()
        lines.append([_draw_word(generator, n, split, invented) for n in lengths])
    return lines


def _draw_word(generator: np.random.Generator, length: int, split: Split, invented: float) -> str:
    if split == "train" and invented > 0 and generator.random() < invented:
        return invent_word(generator, length)
    return pick(generator, words_of_length(split, length, length))


Lines = Sequence[Sequence[str]]
_ANSWERS: dict[str, Callable[[Lines], str]] = {
    "word": lambda lines: lines[0][0],
    "num_letters": lambda lines: str(len(lines[0][0])),
    "first_letter": lambda lines: lines[0][0][0],
    "last_letter": lambda lines: lines[0][0][-1],
    "spell": lambda lines: spelled(lines[0][0]),
    "line": lambda lines: " ".join(lines[0]),
    "num_words": lambda lines: str(sum(len(line) for line in lines)),
    "first_word": lambda lines: lines[0][0],
    "last_word": lambda lines: lines[-1][-1],
    "num_lines": lambda lines: str(len(lines)),
    "all_lines": lambda lines: "\n".join(" ".join(line) for line in lines),
}


def ask(generator: np.random.Generator, kind: str, lines: Lines, num_phrasings: int) -> Question:
    """The question of one kind about these lines."""
    prompt = pick(generator, PROMPTS[kind][:num_phrasings])
    if kind in ("nth_word", "nth_line"):
        options = list(lines[0]) if kind == "nth_word" else [" ".join(line) for line in lines]
        number = int(generator.integers(len(options)))
        return Question(prompt=prompt.format(number + 1), answer=options[number], kind=kind)
    reasoning = spelled(lines[0][0]) if kind == "num_letters" else None
    return Question(prompt=prompt, answer=_ANSWERS[kind](lines), kind=kind, reasoning=reasoning)


def render(
    generator: np.random.Generator, lines: Sequence[str], face: str, level: Level, px: int
) -> PIL.Image.Image:
    """Draw lines one below the other, left-aligned, at a random place."""
    size = float(generator.uniform(*level.size))
    measured = font(face, _MEASURED_PX)
    widest = max(measured.getlength(line) for line in lines) / _MEASURED_PX
    size_px = max(6, int(px * min(size, 0.88 / widest, 0.72 / len(lines))))
    drawn = font(face, size_px)
    step_px = round(size_px * float(generator.uniform(1.15, 1.3)))
    # Hinting may draw small letters wider than the large ones that were measured, and slanted
    # letters reach over both ends of their line.
    margin = 1 + size_px // 8
    width = math.ceil(max(drawn.getlength(line) for line in lines))
    left = margin + int(generator.random() * max(0, px - width - 2 * margin))
    top = 1 + int(generator.random() * max(0, px - step_px * len(lines) - 2))
    dark = generator.integers(0, level.colour_spread + 1, size=3)
    light = 255 - generator.integers(0, level.colour_spread + 1, size=3)
    ink, paper = (light, dark) if generator.integers(4) == 0 else (dark, light)
    image = PIL.Image.new("RGB", (px, px), tuple(paper.tolist()))
    canvas = PIL.ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        # "ls" puts the baseline at a place that does not depend on the letters' heights.
        baseline = top + step_px * number + round(size_px * 0.85)
        canvas.text((left, baseline), line, fill=tuple(ink.tolist()), font=drawn, anchor="ls")
    return image
