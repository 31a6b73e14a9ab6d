"""A suite of real tasks, and responders whose scores are known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cascadevl.eval.suite import Asked, SuiteRow, draw_row
from cascadevl.tasks import TASKS
from cascadevl.tasks.base import Question
from cascadevl.tasks.easy_vqa import EasyVQA
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.shapes import Shapes
from cascadevl.types import ImageRef, Message

SEED = 11
NUM = 12


def suite(num_questions: int = NUM) -> tuple[SuiteRow, ...]:
    """Two rows of one task, rows with few and many questions a picture, one without pictures."""
    shapes = Shapes(num_questions=9)
    return (
        SuiteRow(
            name="numbers",
            task=Handwriting(difficulty="two"),
            num_questions=num_questions,
            keep=lambda question: question.kind == "number",
        ),
        SuiteRow(
            name="shapes: how many?",
            short="how many",
            task=shapes,
            num_questions=num_questions,
            keep=lambda question: question.kind == "count",
        ),
        SuiteRow(
            name="shapes: is there ...?",
            task=shapes,
            num_questions=num_questions,
            keep=lambda question: question.kind == "existence",
        ),
        SuiteRow(name="easy-VQA", task=EasyVQA(), num_questions=num_questions),
        SuiteRow(name="text", task=TASKS["text"](), num_questions=num_questions),
    )


class Scripted:
    """Answers each question as a rule says, finding it by its picture and text alone.

    Attributes:
        num_calls: How often it was called.
    """

    def __init__(self, rule: Callable[[Asked], str], rows: Sequence[SuiteRow] = ()) -> None:
        self._rule, self.num_calls = rule, 0
        self._asked: dict[tuple[bytes, str], Asked] = {}
        for row in rows or suite():
            for asked in draw_row(row, split="test", seed=SEED):
                self._asked[_key_of(asked.scene.image, asked.question)] = asked

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        self.num_calls += 1
        return [self._rule(self._asked[_key(conversation)]) for conversation in conversations]


def reference(asked: Asked) -> str:
    """The whole reference response, worked steps included."""
    return asked.question.response()


def wrong(asked: Asked) -> str:
    """No answer at all."""
    del asked
    return "I cannot see that."


def _key(conversation: Sequence[Message]) -> tuple[bytes, str]:
    (message,) = conversation
    assert message.role == "user"
    pictures = [part for part in message.parts if isinstance(part, ImageRef)]
    assert len(pictures) <= 1
    image = pictures[0].source.tobytes() if pictures else b""  # type: ignore[union-attr]
    return image, message.text.strip()


def _key_of(image: object, question: Question) -> tuple[bytes, str]:
    return (b"" if image is None else image.tobytes(), question.prompt)  # type: ignore[attr-defined]
