"""Scores of responders whose scores are known: all right, all wrong, constant, every third."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tests.eval.small_suite import NUM, SEED, Scripted, reference, suite, wrong

from cascadevl.eval.runner import run_suite
from cascadevl.eval.suite import Asked, SuiteRow, draw_row, most_frequent
from cascadevl.scoring.metrics import wilson_interval
from cascadevl.tasks.shapes import Shapes
from cascadevl.types import Message


def test_the_reference_answers_are_all_right() -> None:
    responder = Scripted(reference)
    scores = run_suite(responder, suite(), seed=SEED)
    assert [score.row for score in scores] == [row.name for row in suite()]
    assert [score.label for score in scores] == [row.label for row in suite()]
    for score in scores:
        assert (score.estimate.value, score.estimate.num) == (1.0, NUM)
        assert all(each.right for each in score.answered)
    assert responder.num_calls == 1  # so that pictures and batches can be shared


def test_wrong_answers_score_nothing_and_are_kept() -> None:
    for score in run_suite(Scripted(wrong), suite(), seed=SEED):
        assert (score.estimate.value, score.estimate.low) == (0.0, 0.0)
        assert {each.response for each in score.answered} == {"I cannot see that."}


def test_a_constant_answer_scores_the_reported_baseline_exactly() -> None:
    constant = {
        row.name: most_frequent(draw_row(row, split="test", seed=SEED)).answer for row in suite()
    }
    scores = run_suite(Scripted(lambda asked: constant[asked.row]), suite(), seed=SEED)
    for score in scores:
        assert score.baseline.answer == constant[score.row]
        assert score.estimate.value == score.baseline.share
        assert 0 < score.baseline.share < 1


def test_every_answer_counts_for_its_own_question_and_row() -> None:
    """Rows of one task share pictures: a mix-up of rows or order would show."""
    order = {
        (each.row, each.scene.scene_id): number
        for row in suite()
        for number, each in enumerate(draw_row(row, split="test", seed=SEED))
    }

    def every_third(asked: Asked) -> str:
        right = order[asked.row, asked.scene.scene_id] % 3 == 0
        return reference(asked) if right else wrong(asked)

    for score in run_suite(Scripted(every_third), suite(), seed=SEED):
        if score.row == "text":
            continue  # texts may repeat, so who is asked cannot be told from the question
        assert [each.right for each in score.answered] == [n % 3 == 0 for n in range(NUM)]
        assert score.estimate.value == 4 / NUM
        assert (score.estimate.low, score.estimate.high) == wilson_interval(4, NUM)


def test_the_training_part_can_be_asked() -> None:
    row = SuiteRow(name="r", task=Shapes(), num_questions=3)
    scores = run_suite(
        lambda conversations: ["?"] * len(conversations), [row], split="train", seed=1
    )
    assert all("/train/" in each.asked.scene.scene_id for each in scores[0].answered)


def test_two_rows_of_one_name_are_refused() -> None:
    row = suite()[0]
    with pytest.raises(ValueError, match="two rows of the suite are named 'numbers'"):
        run_suite(Scripted(reference), [row, row], seed=SEED)


def test_a_responder_that_leaves_out_an_answer_is_noticed() -> None:
    def forgetful(conversations: Sequence[Sequence[Message]]) -> list[str]:
        return ["yes"] * (len(conversations) - 1)

    with pytest.raises(ValueError, match="zip"):
        run_suite(forgetful, suite(), seed=SEED)
