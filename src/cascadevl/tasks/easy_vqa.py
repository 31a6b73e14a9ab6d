"""easy-VQA: coloured shapes with the questions their author wrote, split as the author split them.

The data set of the PyPI package `easy-vqa` (Victor Zhou, MIT licence): 4,000 training and 1,000
test pictures of 64 px, each with one shape and up to 21 questions. A picture's own questions
also tell its colour and shape, which is where the dense description comes from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import PIL.Image

from cascadevl.tasks.base import Question, Scene, Split, scene_generator

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
_NEGATION = re.compile(r"\b(?:not|no)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture of the data set.

    Attributes:
        path: The PNG file.
        asked: All its questions with their answers.
    """

    path: Path
    asked: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EasyVQA:
    """The pictures of easy-VQA.

    Attributes:
        px: Side of the picture.
        num_questions: At most so many questions a picture, drawn anew for every seed and round
            through the pictures.
    """

    px: int = 112
    num_questions: int = 32
    name: ClassVar[str] = "easy_vqa"
    kinds: ClassVar[tuple[str, ...]] = ("yes_no", "shape", "color")

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """Draw one picture; the first so many indices visit every picture of the split once."""
        picture = picture_at(split, seed, index)
        generator = scene_generator(self.name, split, seed, index)
        chosen = generator.permutation(len(picture.asked))[: self.num_questions]
        return Scene(
            scene_id=f"{self.name}/{self.px}px/{split}/{picture.path.stem}/{seed}:{index}",
            images=(enlarged(picture, self.px),),
            questions=tuple(_question(*picture.asked[int(number)]) for number in chosen),
            description=describe(picture),
        )


def picture_at(split: Split, seed: int, index: int) -> Picture:
    """The picture of that split, seed and index; the first so many visit each picture once."""
    pictures = load_pictures(split)
    lap, place = divmod(index, len(pictures))
    return pictures[_order(len(pictures), seed, lap)[place]]


def enlarged(picture: Picture, px: int) -> PIL.Image.Image:
    """A picture with sides of so many pixels."""
    with PIL.Image.open(picture.path) as file:
        return file.convert("RGB").resize((px, px), PIL.Image.Resampling.BICUBIC)


@lru_cache(maxsize=8)
def _order(num_pictures: int, seed: int, lap: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, lap]).permutation(num_pictures).tolist())


@lru_cache(maxsize=2)
def load_pictures(split: Split) -> tuple[Picture, ...]:
    """All pictures of the author's training or test part."""
    import easy_vqa  # reads its question files when asked, not when imported

    load = easy_vqa.get_train_questions if split == "train" else easy_vqa.get_test_questions
    paths = (
        easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    )
    asked: dict[int, list[tuple[str, str]]] = {}
    for prompt, answer, number in zip(*load(), strict=True):
        asked.setdefault(number, []).append((prompt, answer))
    return tuple(
        Picture(path=Path(paths[number]), asked=tuple(pairs))
        for number, pairs in sorted(asked.items())
    )


def _question(prompt: str, answer: str) -> Question:
    return Question(prompt=prompt[:1].upper() + prompt[1:], answer=answer, kind=_kind(answer))


def _kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes_no"
    return "shape" if answer in SHAPES else "color"


def describe(picture: Picture) -> str:
    """What the questions and answers of a picture say about its one shape."""
    colour, shape = attributes(picture)
    return f"One {colour} {shape or 'shape'}.".replace("  ", " ")


def attributes(picture: Picture) -> tuple[str, str]:
    """Colour and shape of a picture, as far as its questions tell; empty where they do not."""
    facts: set[str] = set()
    for prompt, answer in picture.asked:
        words = set(re.findall(r"[a-z]+", prompt))
        if answer in ("yes", "no"):
            negated = _NEGATION.search(prompt) is not None
            if (answer == "yes") != negated:
                facts |= words
        else:
            facts |= words | {answer}
    colour = next((name for name in COLOURS if name in facts), "")
    shape = next((name for name in SHAPES if name in facts), "")
    return colour, shape
