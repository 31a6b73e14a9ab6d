"""Votes are counted as by hand, and a choice that is called settled stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import process_reward_by_hand as by_hand

from cascadevl.scoring.voting import ballot, calibrated_score, is_decided, tally

VOTES = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=9)


@pytest.mark.parametrize(
    ("text", "vote"),
    [
        ("<think>\nHm.\n</think>\n\n12.0", "12"),
        ("So\nFinal answer: 12", "12"),
        ("\\boxed{1,200}", "1200"),
        ("Answer: (B)", "b"),
        ("Answer: B. red circle", "b"),
        ("Answer: Bread", "bread"),
        ("Answer:  A red  Door.", "a red door"),
        ("<think>\nnever closed", None),
        ("", None),
    ],
)
def test_an_answer_votes_for_its_final_answer(text: str, vote: str | None) -> None:
    assert ballot(text) == vote


@given(VOTES)
def test_the_leader_is_that_of_the_loops(ballots: list[str | None]) -> None:
    standing = tally(ballots)
    assert (standing[0][0] if standing else None) == by_hand.majority(ballots)
    assert sum(count for _, count in standing) == sum(each is not None for each in ballots)


@given(VOTES, VOTES)
def test_settled_means_that_no_rest_changes_the_leader_and_open_that_one_does(
    ballots: list[str | None], rest: list[str | None]
) -> None:
    leader = by_hand.majority(ballots)
    if is_decided(ballots, len(rest)):
        assert by_hand.majority([*ballots, *rest]) == leader
    else:
        rivals = ({*ballots} | {"new"}) - {leader, None}
        ends = {by_hand.majority([*ballots, *[rival] * len(rest)]) for rival in rivals}
        assert ends - {leader}, "some rest would change it"


def test_a_tie_that_the_leader_wins_by_coming_first_is_settled() -> None:
    assert is_decided(["a", "a", "b"], 1)
    assert not is_decided(["b", "a", "a"], 1)
    assert not is_decided([None, None], 1)
    assert is_decided([None], 0)


def test_a_calibrated_score_on_paper() -> None:
    scores = [0.9, 0.8, 0.7, 0.6, 0.5]
    right = [True, True, False, True, False]
    assert calibrated_score(scores, right, precision=1.0) == 0.8
    assert calibrated_score(scores, right, precision=0.75) == 0.6  # 3 of 4
    assert calibrated_score(scores, right, precision=0.6) == 0.5
    assert calibrated_score([0.9], [False], precision=0.5) is None


def test_equal_scores_are_taken_together() -> None:
    assert calibrated_score([0.9, 0.9], [True, False], precision=1.0) is None
    assert calibrated_score([0.9, 0.9], [True, False], precision=0.5) == 0.9
