"""Rows draw the questions they keep, always the same ones, one a picture."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.eval.small_suite import NUM, SEED, suite

from cascadevl.eval.suite import Asked, SuiteRow, draw_row, most_frequent
from cascadevl.tasks.base import Question, Scene
from cascadevl.tasks.easy_vqa import EasyVQA
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.shapes import Shapes

ROWS = {row.name: row for row in suite()}


def asked(*answers: str, metric: str = "exact") -> list[Asked]:
    scene = Scene(scene_id="s", images=(), questions=(), description="")
    return [
        Asked(
            row="r",
            scene=scene,
            question=Question(prompt="?", answer=answer, kind="k", metric=metric),  # type: ignore[arg-type]
        )
        for answer in answers
    ]


def facts(drawn: list[Asked]) -> list[tuple[str, str, str]]:
    return [(each.scene.scene_id, each.question.prompt, each.question.answer) for each in drawn]


@pytest.mark.parametrize("name", list(ROWS))
def test_the_same_questions_are_drawn_again(name: str) -> None:
    first, again, other = (draw_row(ROWS[name], split="test", seed=s) for s in (3, 3, 4))
    assert len(first) == NUM
    assert facts(first) == facts(again)
    assert facts(first) != facts(other)


@pytest.mark.parametrize("name", list(ROWS))
def test_each_question_is_about_a_scene_of_its_own_that_asks_it(name: str) -> None:
    row = ROWS[name]
    drawn = draw_row(row, split="test", seed=SEED)
    assert len({each.scene.scene_id for each in drawn}) == NUM
    for each in drawn:
        assert each.row == name
        assert each.question in each.scene.questions
        assert row.keep(each.question)


def test_a_longer_row_begins_like_a_shorter_one() -> None:
    task = Shapes(num_questions=9)
    short, long = (SuiteRow(name="r", task=task, num_questions=n) for n in (5, 9))
    assert facts(draw_row(long, split="test", seed=0))[:5] == facts(
        draw_row(short, split="test", seed=0)
    )


def test_the_parts_of_the_material_are_kept_apart() -> None:
    row = SuiteRow(name="r", task=EasyVQA(), num_questions=30)
    train, test = (
        {each.scene.scene_id.split("/")[2] for each in draw_row(row, split=split, seed=0)}
        for split in ("train", "test")
    )
    assert (train, test) == ({"train"}, {"test"})


def test_scenes_without_a_kept_question_are_passed_over() -> None:
    row = SuiteRow(
        name="only 7",
        task=Handwriting(difficulty="one"),
        num_questions=4,
        keep=lambda question: question.answer == "7",
    )
    assert [each.question.answer for each in draw_row(row, split="test", seed=0)] == ["7"] * 4


def test_a_question_that_is_never_asked_is_an_error_with_numbers() -> None:
    row = SuiteRow(
        name="music",
        task=Handwriting(difficulty="one"),
        num_questions=1,
        keep=lambda question: question.kind == "melody",
    )
    with pytest.raises(ValueError, match=r"row 'music': 100 scenes gave 0 of 1 questions"):
        draw_row(row, split="test", seed=0)


def test_a_row_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="gave 0 of 0"):
        draw_row(SuiteRow(name="r", task=EasyVQA(), num_questions=0), split="test", seed=0)


def test_a_label_is_the_short_name_where_there_is_one() -> None:
    assert [row.label for row in suite()[:2]] == ["numbers", "how many"]


def test_the_most_frequent_answer_is_counted() -> None:
    baseline = most_frequent(asked("no", "yes", "2", "yes"))
    assert (baseline.answer, baseline.share) == ("yes", 0.5)


def test_the_most_frequent_answer_scores_as_answers_are_checked() -> None:
    """Always saying 3 is also right where the reference writes 3.0."""
    baseline = most_frequent(asked("3", "3", "3.0", "4", metric="number"))
    assert (baseline.answer, baseline.share) == ("3", 0.75)


def test_of_equally_frequent_boxes_the_best_is_taken() -> None:
    boxes = (
        "[[0, 0, 90, 90]]",
        "[[500, 500, 600, 600]]",
        "[[510, 510, 600, 600]]",
        "[[1, 2, 3, 4]]",
    )
    baseline = most_frequent(asked(*boxes, metric="box"))
    assert (baseline.answer, baseline.share) == (boxes[1], 0.5)


def test_no_constant_answer_does_better_than_the_baseline() -> None:
    for row in suite():
        drawn = draw_row(row, split="test", seed=SEED)
        counts = Counter(each.question.answer for each in drawn)
        best = max(sum(each.question.check(answer) for each in drawn) for answer in counts)
        assert most_frequent(drawn).share == best / NUM


def test_no_questions_have_no_most_frequent_answer() -> None:
    with pytest.raises(ValueError, match="no questions"):
        most_frequent([])
