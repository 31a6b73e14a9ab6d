"""Steps: split and merged as in the public data, labelled, aggregated and measured by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import process_reward_by_hand as by_hand

from cascadevl.scoring.steps import (
    StepRules,
    aggregated,
    best_threshold,
    labels_of,
    macro_f1,
    merge_steps,
    split_steps,
    steps_of,
)


def test_steps_are_paragraphs_and_blank_ones_are_none() -> None:
    text = "\n\nFirst\nstill first \n\n\n\nsecond\n\n  \n\n\nthird\n"
    assert split_steps(text) == ["First\nstill first", "second", "third"]
    assert split_steps(text, "\n") == ["First", "still first", "second", "third"]
    assert split_steps(" \n\n ") == []


@pytest.mark.parametrize(
    ("number", "most", "sizes"),
    [
        (12, 12, [1] * 12),
        (13, 12, [2] * 6 + [1]),
        (25, 12, [3] * 8 + [1]),
        (17, 16, [2] * 8 + [1]),
        (5, 1, [5]),
        (0, 12, []),
    ],
)
def test_too_many_steps_become_runs_of_neighbours(number: int, most: int, sizes: list[int]) -> None:
    steps = [f"step {n}" for n in range(number)]
    merged = merge_steps(steps, StepRules(max_steps=most))
    assert [step.count("step") for step in merged] == sizes
    assert "\n\n".join(merged) == "\n\n".join(steps)


@given(st.text(alphabet="ab \n", max_size=60), st.integers(1, 5))
def test_nothing_but_blank_space_is_lost_and_the_limit_holds(text: str, most: int) -> None:
    steps = steps_of(text, StepRules(max_steps=most))
    assert len(steps) <= most
    assert "".join("".join(steps).split()) == "".join(text.split())
    assert all(step == step.strip() != "" for step in steps)


def test_a_label_asks_for_more_than_the_threshold() -> None:
    mc = [1.0, 0.5, 1 / 16, 0.0]
    assert labels_of(mc) == [True, True, True, False]
    assert labels_of(mc, 0.5) == [True, False, False, False]


def test_scores_become_one_on_paper() -> None:
    scores = [0.9, 0.5, 0.7]
    assert aggregated(scores) == pytest.approx(0.7)
    assert aggregated(scores, "min") == 0.5
    assert aggregated(scores, "product") == pytest.approx(0.315)
    assert aggregated(scores, "last") == 0.7
    assert aggregated([]) == 0.0


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([True, False, None])), max_size=30))
def test_macro_f1_equals_the_loops(pairs: list[tuple[bool, bool | None]]) -> None:
    found, truth = [a for a, _ in pairs], [b for _, b in pairs]
    assert math.isclose(macro_f1(found, truth), by_hand.macro_f1(found, truth))


def test_a_neutral_step_does_not_count_and_both_classes_do() -> None:
    assert macro_f1([True, False], [True, None]) == 0.5  # no wrong step: its F1 is 0
    assert macro_f1([True, False, True], [True, False, None]) == 1.0
    always_right = macro_f1([True] * 10, [True] * 9 + [False])
    assert always_right == pytest.approx((18 / 19) / 2)


def test_the_best_threshold_separates_best() -> None:
    scores, truth = [0.95, 0.9, 0.6, 0.4, 0.1], [True, True, False, False, None]
    assert best_threshold(scores, truth) == (0.6, 1.0)
    with pytest.raises(ValueError, match="no scores"):
        best_threshold([], [])


@pytest.mark.parametrize("values", [{"separator": ""}, {"separator": "; "}, {"max_steps": 0}])
def test_rules_without_a_meaning_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"separator|max_steps"):
        StepRules(**values)  # type: ignore[arg-type]
