"""Solutions for people to read: every step with the colour of its score, as one page of HTML.

What is shown is what `cascadevl generate --reward-model` has written, with the scores of a process
reward model; or training data of one (`cascadevl data process`), with the shares of right
continuations. Everything is inlined and escaped, and nothing is fetched.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import PIL.Image

from cascadevl.data.image import open_image
from cascadevl.data.json_text import decode_json
from cascadevl.data.parsing import parse_record
from cascadevl.data.process_records import judged_question, read_judged
from cascadevl.data.questions import Line, parse_question, read_lines
from cascadevl.errors import ConfigError, DataError
from cascadevl.types import ImageRef, Message

PICTURE_PX = 480
"""Longest side of a picture on the page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownStep:
    """A step and its score.

    Attributes:
        text: What it says.
        score: From 0, wrong by then, to 1, right so far.
    """

    text: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSolution:
    """A solution on the page.

    Attributes:
        name: Which one it is.
        steps: Its steps.
        question: What it answers, if that is known.
        total: What is said of it as a whole; empty for nothing.
    """

    name: str
    steps: tuple[ShownStep, ...]
    question: Message | None = None
    total: str = ""


def read_solutions(path: Path, *, questions: Path | None = None) -> Iterator[ShownSolution]:
    """The judged solutions of a file, one a line.

    Args:
        path: Answers with ``steps`` and ``step_scores``, or judged solutions in the released form.
        questions: The file that the answers answer, so that questions can be shown.

    Raises:
        DataError: If a line is neither, or a question is not there.
    """
    asked = {} if questions is None else {line.number: line for line in read_lines(questions)}
    for line in read_lines(path):
        source = f"{path}:{line.number}"
        fields: Any = decode_json(line.content, source=source)
        if isinstance(fields, Mapping) and "conversations" in fields:
            yield _of_data(fields, line, path)
        elif isinstance(fields, Mapping) and {"steps", "step_scores"} <= fields.keys():
            yield _of_answer(fields, source, asked, questions)
        else:
            raise DataError(
                "the line holds no judged steps",
                kind="bad_field",
                source=source,
                remedy="give what `cascadevl generate --reward-model` or `cascadevl data process` "
                "has written",
            )


def _of_answer(
    fields: Mapping[str, Any], source: str, asked: Mapping[int, Line], questions: Path | None
) -> ShownSolution:
    question = None
    if questions is not None:
        line = asked.get(fields.get("line", 0))
        if line is None:
            raise DataError(
                f"it answers line {fields.get('line')}, which {questions} does not have",
                kind="bad_field",
                source=source,
                remedy="name the file that was answered",
            )
        _, messages = parse_question(line, file=questions, root=questions.parent)
        question = judged_question(messages)
    total = f"score {_two(fields['score'])}" if "score" in fields else ""
    if "num_drawn" in fields:
        total = f"{total}, the best of {fields['num_drawn']}".removeprefix(", ")
    return ShownSolution(
        name=str(fields.get("id", source)),
        steps=_steps(fields["steps"], fields["step_scores"], source),
        question=question,
        total=total,
    )


def _of_data(fields: Mapping[str, Any], line: Line, path: Path) -> ShownSolution:
    source = f"{path}:{line.number}"
    judged = read_judged(parse_record(fields, source=source, root=path.parent))
    scores = fields.get("mc") or [float(label) for label in judged.labels]
    minus = judged.labels.count(False)
    return ShownSolution(
        name=str(fields.get("id", source)),
        steps=_steps(judged.steps, scores, source),
        question=judged.question,
        total=f"{minus} of {len(judged.steps)} steps labelled wrong",
    )


def _steps(texts: Sequence[Any], scores: Sequence[Any], source: str) -> tuple[ShownStep, ...]:
    fits = len(texts) == len(scores) and all(isinstance(each, str) for each in texts)
    if not fits or not all(isinstance(each, int | float) and 0 <= each <= 1 for each in scores):
        raise DataError(
            f"{len(texts)} steps have {len(scores)} scores; each needs one from 0 to 1",
            kind="bad_field",
            source=source,
        )
    pairs = zip(texts, scores, strict=True)
    return tuple(ShownStep(text=text, score=float(score)) for text, score in pairs)


def write_page(
    solutions: Iterator[ShownSolution], path: Path, *, title: str, max_solutions: int = 50
) -> int:
    """Write solutions as one page.

    Args:
        solutions: What is shown, in order.
        path: The file.
        title: Heading.
        max_solutions: Most solutions of a page; how many are left is said at its end.

    Returns:
        How many are shown.

    Raises:
        ConfigError: If there are none.
        DataError: If a picture cannot be opened.
    """
    shown = list(islice(solutions, max_solutions))
    if not shown:
        raise ConfigError("there are no solutions to show; is the file empty?")
    num_left = sum(1 for _ in solutions)
    source = files("cascadevl").joinpath("assets/steps.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(source).render(
        title=title,
        lead="Every step has the colour of its score: how likely it is that all is right up to it.",
        solutions=[_rendered(each) for each in shown],
        num_left=num_left,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, "utf-8")
    return len(shown)


def _rendered(solution: ShownSolution) -> dict[str, Any]:
    parts = () if solution.question is None else solution.question.parts
    return {
        "name": solution.name,
        "total": solution.total,
        "question": "".join(part for part in parts if isinstance(part, str)).strip(),
        "pictures": [_picture(part) for part in parts if isinstance(part, ImageRef)],
        "steps": [_rendered_step(step) for step in solution.steps],
    }


def _rendered_step(step: ShownStep) -> dict[str, Any]:
    """A step; ``share`` is how far it is from the lower to the upper of its two colours."""
    half = 2 * step.score - (1 if step.score >= 0.5 else 0)
    return {
        "text": step.text,
        "score": step.score,
        "shown": _two(step.score),
        "percent": f"{100 * step.score:.1f}",
        "share": f"{100 * half:.1f}",
    }


def _two(score: float) -> str:
    return f"{score:.2f}"


def _picture(ref: ImageRef) -> str:
    image = open_image(ref, source="the question")
    image.thumbnail((PICTURE_PX, PICTURE_PX), PIL.Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
