"""Where is it, in coordinates: boxes of coloured shapes in the released grounding format.

A box is four whole numbers from 0 to 1000, shares of the picture's width and height in
thousandths, inside ``<box>`` tags after the name in ``<ref>`` tags.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cascadevl.tasks.base import Question, Scene, Split, check_difficulty, pick, scene_generator
from cascadevl.tasks.shape_drawing import Thing, render
from cascadevl.tasks.shapes import LEVELS, PAPERS, draw_things

PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: {}"
"""The query released models were trained with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grounding:
    """Boxes of coloured shapes.

    Attributes:
        px: Side of the picture.
        num_questions: At most so many questions a picture.
        difficulty: A level of `cascadevl.tasks.shapes`.
    """

    px: int = 112
    num_questions: int = 3
    difficulty: str = "full"
    name: ClassVar[str] = "grounding"

    def __post_init__(self) -> None:
        """Refuse an unknown difficulty."""
        check_difficulty(self.name, self.difficulty, LEVELS)

    @property
    def kinds(self) -> tuple[str, ...]:
        """One object, all objects, and one that only its size tells from another."""
        spoken_sizes = len(LEVELS[self.difficulty].sizes) > 1
        return ("box", "boxes", "sized_box") if spoken_sizes else ("box", "boxes")

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """Draw one picture with its questions."""
        generator = scene_generator(f"{self.name}/{self.difficulty}", split, seed, index)
        things = draw_things(generator, LEVELS[self.difficulty])
        paper = pick(generator, PAPERS)
        questions = [_ask_all(things)] if len(things) > 1 else []
        names = Counter(thing.name for thing in things)
        full_names = Counter(thing.full_name for thing in things)
        for thing in things:
            if names[thing.name] == 1:
                questions.append(_ask_one(thing, "box"))
            elif full_names[thing.full_name] == 1:
                questions.append(_ask_one(thing, "sized_box"))
        order = generator.permutation(len(questions))[: self.num_questions]
        return Scene(
            scene_id=f"{self.name}/{self.difficulty}/{self.px}px/{split}/{seed}:{index}",
            images=(render(things, paper, self.px),),
            questions=tuple(questions[int(number)] for number in order),
            description=", ".join(tagged(thing.full_name, [thing]) for thing in things),
        )


def tagged(name: str, things: Sequence[Thing]) -> str:
    """A name and the boxes of what it names, in the released format."""
    boxes = ", ".join(
        "[" + ", ".join(str(round(edge * 1000)) for edge in thing.box) + "]" for thing in things
    )
    return f"<ref>{name}</ref><box>[{boxes}]</box>"


def _ask_one(thing: Thing, kind: str) -> Question:
    name = thing.full_name if kind == "sized_box" else thing.name
    prompt = PROMPT.format(f"<ref>{name}</ref>")
    return Question(prompt=prompt, answer=tagged(name, [thing]), kind=kind, metric="box")


def _ask_all(things: Sequence[Thing]) -> Question:
    prompt = PROMPT.format("<ref>shape</ref>")
    return Question(prompt=prompt, answer=tagged("shape", things), kind="boxes", metric="box")
