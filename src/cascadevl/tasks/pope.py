"""The released files of POPE as a task: a question of existence a line, pictures in a folder.

Li et al., arXiv 2305.10355. A line holds ``{"question_id": 1, "image": "COCO_val2014_....jpg",
"text": "Is there a snowboard in the image?", "label": "yes"}``; there is a file for each way of
drawing what is not there. The pictures are those of COCO and not part of the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import PIL.Image

from cascadevl.data.field_values import text_of, wrong_type
from cascadevl.data.image import open_image
from cascadevl.data.json_text import decode_json
from cascadevl.data.questions import read_lines
from cascadevl.errors import ConfigError, DataError
from cascadevl.tasks.base import Question, Scene, Split
from cascadevl.types import ImageRef


@dataclass(frozen=True, slots=True, kw_only=True)
class PopeQuestion:
    """One line of a file.

    Attributes:
        question_id: As it stands there.
        image: Name of the picture.
        text: The question.
        is_there: Whether yes is right.
        source: File and line.
    """

    question_id: int | str
    image: str
    text: str
    is_there: bool
    source: str


@lru_cache(maxsize=16)
def read_pope(path: Path) -> tuple[PopeQuestion, ...]:
    """The questions of a file.

    Args:
        path: The file, JSON lines.

    Raises:
        DataError: If it cannot be read, or a line is not of that form.
    """
    return tuple(
        _parsed(decode_json(line.content, source=f"{path}:{line.number}"), f"{path}:{line.number}")
        for line in read_lines(path)
    )


def _parsed(fields: object, source: str) -> PopeQuestion:
    if not isinstance(fields, Mapping):
        raise wrong_type(fields, "an object", source, "the line")
    number = fields.get("question_id")
    if not isinstance(number, int | str):
        raise wrong_type(number, "a number or a text", source, "question_id")
    label = text_of(fields.get("label"), source, "label").strip().lower()
    if label not in ("yes", "no"):
        raise DataError(
            f"is {label!r}", kind="bad_field", source=source, field="label", remedy="give yes or no"
        )
    return PopeQuestion(
        question_id=number,
        image=text_of(fields.get("image"), source, "image"),
        text=text_of(fields.get("text"), source, "text"),
        is_there=label == "yes",
        source=source,
    )


@lru_cache(maxsize=64)
def _opened(path: Path, source: str) -> PIL.Image.Image:
    return open_image(ImageRef(path), source=source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pope:
    """The questions of a released file, line by line: scene n is line n, whatever split and seed.

    Attributes:
        path: The file, as coco_pope_adversarial.json.
        images: Folder of the pictures.
    """

    path: Path
    images: Path
    name: ClassVar[str] = "pope"
    kinds: ClassVar[tuple[str, ...]] = ("existence",)

    @property
    def num_questions(self) -> int:
        """How many there are."""
        return len(read_pope(self.path))

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """The question of a line with its picture.

        Raises:
            DataError: If file or picture cannot be used.
            ConfigError: If there are not so many lines.
        """
        del split, seed
        questions = read_pope(self.path)
        if index >= len(questions):
            raise ConfigError(f"{self.path} has {len(questions)} questions; ask for no more")
        asked = questions[index]
        answer = "yes" if asked.is_there else "no"
        question = Question(prompt=asked.text, answer=answer, kind="existence")
        return Scene(
            scene_id=f"{self.name}/{asked.image}/{asked.question_id}",
            # The questions about one picture stand together, so it is opened once for all of them.
            images=(_opened(self.images / asked.image, asked.source),),
            questions=(question,),
            description="",
        )
