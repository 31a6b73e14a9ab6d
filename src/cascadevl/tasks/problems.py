"""Questions with references that sampled answers are checked against: of tasks, or of a file.

Problems come in numbered groups, so that work on them can stop and go on by number alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from cascadevl.data.conversation import split_thinking, thinking_answer
from cascadevl.data.image import open_image
from cascadevl.data.json_text import decode_json
from cascadevl.data.parsing import PAIR_FIELDS, parse_record
from cascadevl.data.questions import parse_question, read_lines
from cascadevl.errors import DataError
from cascadevl.scoring.answers import final_answer
from cascadevl.tasks.base import Metric, Question, Split, Task, to_prompt
from cascadevl.types import ImageRef, Message, Rollout, VideoRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question whose answers can be checked.

    Attributes:
        problem_id: Identity; names its records and pictures.
        prompt: The user's turn: pictures and the question.
        reference: The reference answer, short.
        check: Whether a response gives the right final answer.
        solutions: Worked solutions that came with it, in thinking form; often none.
        metric: How ``check`` compares; empty for an open question, to which no answer is right.
        choices: Letter and text of each choice, for metric ``"choice"``.
    """

    problem_id: str
    prompt: Message
    reference: str
    check: Callable[[str], bool]
    solutions: tuple[str, ...] = ()
    metric: Metric | Literal[""] = ""
    choices: tuple[tuple[str, str], ...] = ()


@runtime_checkable
class Problems(Protocol):
    """Problems in numbered groups."""

    def __len__(self) -> int:
        """Number of groups."""

    def __getitem__(self, index: int, /) -> Sequence[Problem]:
        """One group, always the same.

        Raises:
            DataError: If this group cannot be used.
        """

    def settings(self) -> dict[str, Any]:
        """JSON values that say which problems these are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskProblems:
    """Questions of tasks, a scene a group, the tasks in turn.

    Attributes:
        tasks: The tasks.
        num_scenes: Scenes of each.
        split: Which part of the material.
        seed: Seed of the scenes.
        worked_only: Only questions that come with worked reasoning.
    """

    tasks: Sequence[Task]
    num_scenes: int
    split: Split = "train"
    seed: int = 0
    worked_only: bool = True

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self.tasks) * self.num_scenes

    def __getitem__(self, index: int, /) -> list[Problem]:
        """The questions of one scene; none where no question is wanted."""
        place, number = index % len(self.tasks), index // len(self.tasks)
        scene = self.tasks[place].draw(self.split, self.seed, number)
        problems = []
        for order, question in enumerate(scene.questions):
            if question.reasoning is None and self.worked_only:
                continue
            worked = () if question.reasoning is None else (question.response("think"),)
            problems.append(
                Problem(
                    problem_id=f"{scene.scene_id}#{order}",
                    prompt=to_prompt(scene, question)[0],
                    reference=question.answer,
                    check=question.check,
                    solutions=worked,
                    metric=question.metric,
                    choices=question.choices,
                )
            )
        return problems

    def settings(self) -> dict[str, Any]:
        """The tasks with their settings, and the scenes."""
        return {
            "tasks": [repr(task) for task in self.tasks],
            "num_scenes": self.num_scenes,
            "split": self.split,
            "seed": self.seed,
            "worked_only": self.worked_only,
        }


class FileProblems:
    """Questions of a JSONL file, a line a group.

    A line holds ``question`` and ``answer`` (``answer_gt`` in MMPR), or a conversation in the
    released format whose last answer is the reference; ``image`` and ``id`` as in any record. Of
    preference pairs, only the question and its reference count. Further fields: ``metric``, how
    answers are compared (a `Metric`; without it "math" where the reference has a digit or a
    formula, else "exact"), ``choices``, a letter's text each, and ``solution``, a worked solution
    in thinking form. A system turn is left out: here it says the mode.
    """

    def __init__(self, path: Path, *, root: Path | None = None) -> None:
        """Read the file; lines are looked at when they are asked for.

        Args:
            path: The file.
            root: Folder that the paths of pictures start from; the file's own if None.

        Raises:
            DataError: Of kind ``missing_file``.
        """
        self._path, self._root = path, root or path.parent
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"the file cannot be read ({error.strerror})",
                kind="missing_file",
                source=str(path),
                remedy="check the path",
            ) from error
        numbered = enumerate(content.splitlines(), start=1)
        self._lines = [(number, line) for number, line in numbered if line.strip()]

    def __len__(self) -> int:
        """Number of lines that are not blank."""
        return len(self._lines)

    def __getitem__(self, index: int, /) -> list[Problem]:
        """The problem of one line."""
        number, line = self._lines[index]
        source = f"{self._path}:{number}"
        fields = decode_json(line, source=source)
        if isinstance(fields, Mapping) and "question" in fields:
            own = {key: fields[key] for key in fields if key not in PAIR_FIELDS}
            fields = {**own, "conversations": _turns(fields, source)}
        record = parse_record(fields, source=source, root=self._root, position=f"{number}")
        assert isinstance(fields, Mapping), "the parser takes nothing else"
        turns = [turn for turn in record.messages if turn.role != "system"]
        if [turn.role for turn in turns] != ["user", "assistant"]:
            raise DataError(
                f"the conversation has {len(turns)} turns, the system's not counted",
                kind="bad_turns",
                source=source,
                remedy="give one question and its answer",
            )
        prompt, answer = turns
        _open_pictures(prompt, source)
        reference = final_answer(answer.text)
        question = Question(
            prompt=prompt.text,
            answer=reference,
            kind="",
            metric=_metric(fields, reference, source),
            choices=_choices(fields, source),
        )
        return [
            Problem(
                problem_id=f"{self._path.stem}:{record.record_id}",
                prompt=prompt,
                reference=reference,
                check=question.check,
                solutions=_solutions(fields, answer.text, source),
                metric=question.metric,
                choices=question.choices,
            )
        ]

    def settings(self) -> dict[str, Any]:
        """The file and its length."""
        return {"file": str(self._path.resolve()), "root": str(self._root), "num": len(self)}


class OpenProblems:
    """Questions of a JSONL file that have no reference, a line each: no answer to them is right.

    A line is one that `cascadevl.data.questions.parse_question` reads, with one question; an answer
    at its end is left out, and so is a system turn.
    """

    def __init__(self, path: Path, *, root: Path | None = None) -> None:
        """Read the file; lines are looked at when they are asked for.

        Args:
            path: The file.
            root: Folder that the paths of pictures start from; the file's own if None.

        Raises:
            DataError: Of kind ``missing_file``.
        """
        self._path, self._root = path, root or path.parent
        self._lines = list(read_lines(path))

    def __len__(self) -> int:
        """Number of lines that are not blank."""
        return len(self._lines)

    def __getitem__(self, index: int, /) -> list[Problem]:
        """The question of one line."""
        line = self._lines[index]
        source = f"{self._path}:{line.number}"
        name, messages = parse_question(line, file=self._path, root=self._root)
        turns = [turn for turn in messages if turn.role != "system"]
        if len(turns) != 1:
            raise DataError(
                f"the conversation has {len(turns)} turns before the answer, the system's not "
                "counted",
                kind="bad_turns",
                source=source,
                remedy="give one question",
            )
        _open_pictures(turns[0], source)
        own = "" if name == line.number else f":{name}"
        return [
            Problem(
                problem_id=f"{self._path.stem}:{line.number}{own}",
                prompt=turns[0],
                reference="",
                check=_nothing_is_right,
            )
        ]

    def settings(self) -> dict[str, Any]:
        """The file and its length."""
        return {"open": str(self._path.resolve()), "root": str(self._root), "num": len(self)}


def _nothing_is_right(_: str) -> bool:
    return False


def problem_of(rollout: Rollout) -> Problem:
    """The question of a stored group, which further answers can be checked against.

    Args:
        rollout: The group.

    Raises:
        DataError: Of kind ``bad_field``, if its metric is unknown.
    """
    metric = _known(rollout.metric, rollout.problem_id) if rollout.metric else ""
    question = Question(
        prompt=rollout.prompt[-1].text,
        answer=rollout.reference,
        kind="",
        metric=metric or "exact",
        choices=rollout.choices,
    )
    return Problem(
        problem_id=rollout.problem_id,
        prompt=rollout.prompt[-1],
        reference=rollout.reference,
        check=question.check if metric else _nothing_is_right,
        metric=metric,
        choices=rollout.choices,
    )


def _open_pictures(prompt: Message, source: str) -> None:
    """Meet a broken picture here, where one problem is left out for it, and not while sampling."""
    for part in prompt.parts:
        if isinstance(part, ImageRef):
            open_image(part, source=source)
        elif isinstance(part, VideoRef):
            raise DataError(
                "problems with a video are not supported",
                kind="bad_field",
                source=source,
                field="video",
                remedy="give its frames as images",
            )


def _turns(fields: Mapping[str, Any], source: str) -> list[dict[str, Any]]:
    question = fields["question"]
    answer = fields.get("answer", fields.get("answer_gt"))
    if not isinstance(question, str):
        raise DataError(
            f"is {question!r:.60}",
            kind="bad_field",
            source=source,
            field="question",
            remedy="give the question as text",
        )
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str):
        raise DataError(
            "the question has no answer to check others against",
            kind="bad_field",
            source=source,
            field="answer",
            remedy="give the reference answer as text",
        )
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _metric(fields: Mapping[str, Any], reference: str, source: str) -> Metric:
    metric = fields.get("metric")
    if metric is None:
        has_number = any(each.isdigit() or each == "\\" for each in reference)
        return "choice" if "choices" in fields else "math" if has_number else "exact"
    return _known(metric, source)


def _known(metric: object, source: str) -> Metric:
    for known in get_args(Metric):
        if metric == known:
            return known  # type: ignore[no-any-return]
    raise DataError(
        f"the metric is {metric!r}",
        kind="bad_field",
        source=source,
        field="metric",
        remedy=f"use one of {', '.join(get_args(Metric))}",
    )


def _choices(fields: Mapping[str, Any], source: str) -> tuple[tuple[str, str], ...]:
    choices = fields.get("choices") or {}
    if not isinstance(choices, Mapping) or not all(isinstance(v, str) for v in choices.values()):
        raise DataError(
            f"the choices are {choices!r:.60}",
            kind="bad_field",
            source=source,
            field="choices",
            remedy='give {"A": "text", "B": ...}',
        )
    return tuple((str(letter), text) for letter, text in choices.items())


def _solutions(fields: Mapping[str, Any], answer: str, source: str) -> tuple[str, ...]:
    """The given solution, else the reference itself where it shows its thinking."""
    solution = fields.get("solution")
    if solution is None:
        thinking, said = split_thinking(answer)
        return (thinking_answer(thinking, said),) if thinking else ()
    if not isinstance(solution, str):
        raise DataError(
            f"is {solution!r:.60}",
            kind="bad_field",
            source=source,
            field="solution",
            remedy="give text: <think>...</think> and the answer",
        )
    return (solution,)
