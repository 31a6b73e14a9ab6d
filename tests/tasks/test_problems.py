"""Questions from tasks and files: every form that is read, and what is wrong with the others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from cascadevl.errors import DataError
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.problems import (
    FileProblems,
    OpenProblems,
    Problem,
    TaskProblems,
    problem_of,
)
from cascadevl.tasks.text import Text
from cascadevl.types import ImageRef, Message, Rollout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    PIL.Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path


def problems_of(folder: Path, *lines: dict[str, Any] | str) -> FileProblems:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "q.jsonl").write_text("\n".join(texts) + "\n", "utf-8")
    return FileProblems(folder / "q.jsonl")


def only(folder: Path, line: dict[str, Any]) -> Problem:
    (problem,) = problems_of(folder, line)[0]
    return problem


def test_question_and_answer(folder: Path) -> None:
    problem = only(folder, {"id": "x7", "question": "2 + 2?", "answer": "4"})
    assert problem.problem_id == "q:1:x7"
    assert (problem.prompt.role, problem.prompt.parts) == ("user", ("2 + 2?",))
    assert (problem.reference, problem.solutions) == ("4", ())
    assert problem.check("<think>\n5?\n</think>\n\n4.0")
    assert not problem.check("5")


def test_pictures_with_and_without_a_mark(folder: Path) -> None:
    for question in ("<image>\nWhich?", "Which?"):
        problem = only(folder, {"question": question, "answer": "red", "image": "a.png"})
        assert problem.prompt.parts == (ImageRef(folder / "a.png"), "\nWhich?")


def test_released_conversations(folder: Path) -> None:
    turns = [
        {"from": "system", "value": "You are someone."},
        {"from": "human", "value": "2 + 2?"},
        {"from": "gpt", "value": "<think>\ntwo and two\n</think>\n\nAnswer: \\boxed{4}"},
    ]
    problem = only(folder, {"conversations": turns})
    assert problem.prompt.parts == ("2 + 2?",)  # the system turn says the mode, so it is left out
    assert problem.reference == "4"
    assert problem.solutions == ("<think>\ntwo and two\n</think>\n\nAnswer: \\boxed{4}",)
    newer = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    assert only(folder, {"messages": newer}).reference == "4"


@pytest.mark.parametrize(
    ("fields", "right", "wrong"),
    [
        ({"answer": "4"}, "8/2", "5"),  # with a digit: mathematics
        ({"answer": "\\frac{1}{2}"}, "\\boxed{0.5}", "2"),
        ({"answer": "cat"}, "Cat.", "act"),  # without: letters, whose product is another thing
        ({"answer": "3", "metric": "exact"}, "3", "3.0"),
        ({"answer": 100, "metric": "relaxed"}, "104", "106"),
        ({"answer": "a, b", "metric": "list"}, "b and a", "a"),
        ({"answer": "International", "metric": "anls"}, "internationa1", "national"),
        ({"answer": "2 dogs", "metric": "vqa"}, "The two dogs", "dogs"),
        ({"answer": "[[0, 0, 10, 10]]", "metric": "box"}, "[[0, 0, 10, 9]]", "[[9, 9, 10, 10]]"),
        ({"answer": "B", "choices": {"A": "one", "B": "two"}}, "The answer is (B).", "A"),
        ({"answer": "B", "choices": {"A": "one", "B": "two"}}, "two", "one"),
    ],
)
def test_answers_are_compared_by_their_metric(
    folder: Path, fields: dict[str, Any], right: str, wrong: str
) -> None:
    problem = only(folder, {"question": "?", **fields})
    assert problem.check(right)
    assert not problem.check(wrong)


@pytest.mark.parametrize(
    ("line", "kind", "field"),
    [
        ("{", "invalid_json", None),
        ("[]", "bad_field", None),
        ({"question": "?"}, "bad_field", "answer"),
        ({"question": "?", "answer": True}, "bad_field", "answer"),
        ({"question": 5, "answer": "4"}, "bad_field", "question"),
        ({"question": "?", "answer": " "}, "bad_field", "conversations[1].value"),
        ({"question": "?", "answer": "4", "metric": "guess"}, "bad_field", "metric"),
        ({"question": "?", "answer": "4", "choices": ["a"]}, "bad_field", "choices"),
        ({"question": "?", "answer": "4", "solution": 4}, "bad_field", "solution"),
        ({"question": "?", "answer": "4", "image": "no.png"}, "missing_image", "image"),
        ({"question": "?", "answer": "4", "image": "broken.png"}, "unsupported_image", "image"),
        ({"question": "<image>?", "answer": "4"}, "image_count", "conversations[0].value"),
        ({"question": "?", "answer": "4", "video": "a.mp4"}, "bad_field", "video"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                ]
                * 2
            },
            "bad_turns",
            None,
        ),
        ({"conversations": [{"from": "pretrain", "value": "a"}]}, "bad_turns", None),
    ],
)
def test_what_is_no_problem_is_named_with_its_line(
    folder: Path, line: dict[str, Any] | str, kind: str, field: str | None
) -> None:
    problems = problems_of(folder, {"question": "?", "answer": "4"}, "", line)
    assert len(problems) == 2
    with pytest.raises(DataError) as caught:
        problems[1]
    assert (caught.value.kind, caught.value.field) == (kind, field)
    assert caught.value.source == f"{folder / 'q.jsonl'}:3"


def test_a_file_that_is_not_there(folder: Path) -> None:
    with pytest.raises(DataError, match="check the path"):
        FileProblems(folder / "absent.jsonl")


def test_pictures_may_lie_elsewhere(folder: Path) -> None:
    (folder / "sub").mkdir()
    problems_of(folder, {"question": "Which?", "answer": "red", "image": "a.png"})
    (folder / "q.jsonl").rename(folder / "sub" / "q.jsonl")
    (problem,) = FileProblems(folder / "sub" / "q.jsonl", root=folder)[0]
    assert problem.prompt.parts[0] == ImageRef(folder / "a.png")


def test_tasks_take_turns() -> None:
    tasks = [Text(num_questions=11), Handwriting(difficulty="add_digits", num_questions=3)]
    problems = TaskProblems(tasks=tasks, num_scenes=3, seed=5, worked_only=False)
    assert len(problems) == 6
    for index in range(6):
        scene = tasks[index % 2].draw("train", 5, index // 2)
        got = problems[index]
        assert [p.reference for p in got] == [q.answer for q in scene.questions]
        assert [p.prompt.text.strip() for p in got] == [q.prompt for q in scene.questions]
        for problem, question in zip(got, scene.questions, strict=True):
            assert problem.check(question.answer)
            assert len(problem.solutions) == (question.reasoning is not None)
    worked = TaskProblems(tasks=tasks, num_scenes=3, seed=5)
    assert all(problem.solutions for index in range(6) for problem in worked[index])
    questions = tasks[0].draw("train", 5, 0).questions
    assert len(worked[0]) == sum(question.reasoning is not None for question in questions)


def test_preference_pairs_are_questions_too(folder: Path) -> None:
    pair = {"question": "<image>\n2 + 2?", "image": "a.png", "chosen": "4", "rejected": "5"}
    problem = only(folder, {**pair, "answer_gt": "4", "system_prompt": "Think."})
    assert problem.prompt.parts == (ImageRef(folder / "a.png"), "\n2 + 2?")
    assert (problem.reference, problem.metric) == ("4", "math")
    with pytest.raises(DataError, match="no answer to check"):
        only(folder, pair)


def test_a_problem_says_how_it_is_checked(folder: Path) -> None:
    fields = {"question": "?", "answer": "B", "choices": {"A": "one", "B": "two"}}
    problem = only(folder, fields)
    assert (problem.metric, problem.choices) == ("choice", (("A", "one"), ("B", "two")))
    task = Handwriting(difficulty="add_digits", num_questions=3)
    for drawn, asked in zip(
        TaskProblems(tasks=[task], num_scenes=1, worked_only=False)[0],
        task.draw("train", 0, 0).questions,
        strict=True,
    ):
        assert (drawn.metric, drawn.choices) == (asked.metric, asked.choices)


def test_a_stored_question_is_checked_as_it_was() -> None:
    stored = Rollout(
        problem_id="x",
        prompt=(Message.of("system", "s"), Message.of("user", "Which?")),
        reference="B",
        answers=(),
        metric="choice",
        choices=(("A", "one"), ("B", "two")),
    )
    problem = problem_of(stored)
    assert (problem.problem_id, problem.prompt.text, problem.reference) == ("x", "Which?", "B")
    assert problem.check("two")
    assert not problem.check("one")
    assert not problem_of(replace(stored, metric="")).check("B")
    with pytest.raises(DataError, match="the metric is 'guess'"):
        problem_of(replace(stored, metric="guess"))


def open_problems(folder: Path, *lines: dict[str, Any]) -> OpenProblems:
    (folder / "o.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return OpenProblems(folder / "o.jsonl")


def test_open_questions_have_no_right_answer(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A door."}]
    system = {"role": "system", "content": "Think."}
    problems = open_problems(
        folder,
        {"id": "x", "image": "a.png", "conversations": turns},
        {"messages": [system, {"role": "user", "content": "Why?"}]},
        {"question": "<image>\nWhat?", "image": "a.png", "chosen": "A door.", "rejected": "No."},
    )
    assert len(problems) == 3
    (shown,), (told,), (pair,) = problems[0], problems[1], problems[2]
    assert shown.prompt.parts == pair.prompt.parts == (ImageRef(folder / "a.png"), "\nWhat?")
    assert (told.prompt.role, told.prompt.parts) == ("user", ("Why?",))
    assert [each.problem_id for each in (shown, told, pair)] == ["o:1:x", "o:2", "o:3"]
    for each in (shown, told, pair):
        assert (each.reference, each.metric) == ("", "")
        assert not each.check("A door.")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ({"question": "?", "image": "no.png"}, "missing_image"),
        ({"question": "?", "video": "a.mp4"}, "bad_field"),
        ({"id": 5}, "bad_field"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                ]
            },
            "bad_turns",
        ),
    ],
)
def test_what_is_no_open_question_is_named(folder: Path, line: dict[str, Any], kind: str) -> None:
    with pytest.raises(DataError) as caught:
        open_problems(folder, {"question": "?"}, line)[1]
    assert caught.value.kind == kind
    assert str(caught.value.source) == f"{folder / 'o.jsonl'}:2"
