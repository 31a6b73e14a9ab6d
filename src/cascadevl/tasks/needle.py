"""A needle in a haystack of pictures: one of them shows a handwritten number; which?

The long-context task of the V2PE experiments. The pictures stand side by side with no text
between them, so nearly all of a long prompt is visual tokens, and how far apart they are is up
to the position increment alone. The other pictures are shapes, charts and printed words, drawn
from a pool, so that a haystack of hundreds of pictures costs little to draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import PIL.Image

from cascadevl.errors import ConfigError
from cascadevl.tasks.base import (
    Question,
    Scene,
    Split,
    Task,
    pick,
    pick_kinds,
    scene_generator,
)
from cascadevl.tasks.charts import Charts
from cascadevl.tasks.handwriting import LEVELS, draw_number, load_scans, render_rows
from cascadevl.tasks.printed import Printed
from cascadevl.tasks.shapes import Shapes

POOL_SCENES = 256
"""Different pictures of each kind in the haystacks of a split."""

PROMPTS = {
    "number": ("What number is handwritten?", "Find the handwritten number."),
    "first_digit": (
        "What is the first digit of the handwritten number?",
        "Which digit does the handwritten number start with?",
    ),
    "last_digit": (
        "What is the last digit of the handwritten number?",
        "Which digit does the handwritten number end with?",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Needle:
    """A handwritten number of one or two digits among other pictures.

    Attributes:
        px: Side of every picture.
        num_questions: At most so many questions a scene, each of another kind.
        num_pictures: Fewest and most pictures of a scene, the needle included.
        num_phrasings: How many wordings of each question are used.
    """

    px: int = 112
    num_questions: int = 1
    num_pictures: tuple[int, int] = (1, 8)
    num_phrasings: int = 1
    name: ClassVar[str] = "needle"
    kinds: ClassVar[tuple[str, ...]] = tuple(PROMPTS)

    def __post_init__(self) -> None:
        """Refuse a haystack of no pictures."""
        fewest, most = self.num_pictures
        if not 1 <= fewest <= most:
            raise ConfigError(
                f"needle: a scene cannot have from {fewest} to {most} pictures; give two numbers "
                "from 1 on, the smaller one first"
            )

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """Draw one haystack with its questions."""
        fewest, most = self.num_pictures
        generator = scene_generator(f"{self.name}/{fewest}-{most}", split, seed, index)
        num_pictures = int(generator.integers(fewest, most + 1))
        place = int(generator.integers(num_pictures))
        level = LEVELS["two"]
        number = draw_number(generator, level.num_digits)
        needle, _ = render_rows(generator, [number], level, load_scans(split), self.px)
        images = []
        for _ in range(num_pictures - 1):
            family = int(generator.integers(len(_HAYSTACK)))
            images.append(_straw(family, split, int(generator.integers(POOL_SCENES)), self.px))
        images.insert(place, needle)
        answers = {"number": number, "first_digit": number[0], "last_digit": number[-1]}
        questions = [
            Question(
                prompt=pick(generator, PROMPTS[kind][: self.num_phrasings]),
                answer=answers[kind],
                kind=kind,
            )
            for kind in pick_kinds(generator, self.kinds, self.num_questions)
        ]
        return Scene(
            scene_id=f"{self.name}/{fewest}-{most}/{self.px}px/{split}/{seed}:{index}",
            images=tuple(images),
            questions=tuple(questions),
            description=f"{num_pictures} pictures, one with the handwritten number {number}.",
        )


_HAYSTACK: tuple[type[Shapes] | type[Printed] | type[Charts], ...] = (Shapes, Printed, Charts)


@lru_cache(maxsize=len(_HAYSTACK) * POOL_SCENES)
def _straw(family: int, split: Split, index: int, px: int) -> PIL.Image.Image:
    """A picture of the pool of a split."""
    task: Task = _HAYSTACK[family](px=px, num_questions=1)
    image = task.draw(split, 0, index).image
    assert image is not None, "these families draw pictures"
    return image
