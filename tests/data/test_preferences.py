"""Preference pairs: which are made, how evenly, and what is left out."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.some_rollouts import answer, answers, rollout

from cascadevl.data.preferences import (
    PairRules,
    Pairs,
    balanced,
    first_part,
    is_entailed,
    pairs_of,
    preferred,
    shows_a_picture,
    without_pictures,
)
from cascadevl.errors import ConfigError
from cascadevl.types import ImageRef, Message, Rollout

SHOWN = ImageRef(b"never opened")


def question(right: int, wrong: int, **more: object) -> Rollout:
    texts = [f"way {n}\nAnswer: 7" for n in range(right)], [f"Answer: x{n}" for n in range(wrong)]
    return rollout(6, answers=answers(*texts), **more)


def texts(made: Pairs) -> list[tuple[str, str]]:
    return [(chosen.text, rejected.text) for chosen, rejected in made.pairs]


sizes = st.integers(1, 12)


@given(sizes, sizes, st.integers(1, 40), st.integers(0, 9))
def test_every_pair_is_right_against_wrong_and_all_answers_are_used_evenly(
    right: int, wrong: int, most: int, seed: int
) -> None:
    made = pairs_of(question(right, wrong), PairRules(max_pairs=most, seed=seed))
    assert made.outcome == "paired"
    assert len(made.pairs) == min(most, right * wrong)
    assert len(set(texts(made))) == len(made.pairs)
    for chosen, rejected in made.pairs:
        assert chosen.correct
        assert not rejected.correct
    for number, kind in ((right, 0), (wrong, 1)):
        uses = Counter(pair[kind] for pair in texts(made))
        counts = [*uses.values(), *[0] * (number - len(uses))]
        assert max(counts) - min(counts) <= 1


@given(sizes, sizes)
def test_of_all_pairs_any_first_few_are_balanced(left: int, right: int) -> None:
    order = list(balanced(left, right))
    assert sorted(order) == [(one, other) for one in range(left) for other in range(right)]
    for first in range(1, len(order) + 1):
        for kind, number in ((0, left), (1, right)):
            uses = Counter(pair[kind] for pair in order[:first])
            counts = [uses[each] for each in range(number)]
            assert max(counts) - min(counts) <= 1


def test_pairs_depend_on_seed_and_question_alone() -> None:
    def made(seed: int, **more: object) -> list[tuple[str, str]]:
        return texts(pairs_of(question(5, 5, **more), PairRules(max_pairs=4, seed=seed)))

    assert made(0) == made(0)
    assert made(0) == made(0, weight_version="w2")
    assert made(0) != made(1)
    assert made(0) != made(0, problem_id="another")


def test_at_most_fifteen_pairs_by_default() -> None:
    assert len(pairs_of(question(16, 16), PairRules()).pairs) == 15


@pytest.mark.parametrize(
    ("right", "wrong", "outcome"),
    [(0, 3, "none_correct"), (3, 0, "all_correct"), (0, 0, "none_correct"), (1, 1, "paired")],
)
def test_what_becomes_of_a_question(right: int, wrong: int, outcome: str) -> None:
    assert pairs_of(question(right, wrong), PairRules()).outcome == outcome


def test_without_a_reference_there_are_no_pairs() -> None:
    assert pairs_of(question(2, 2, metric=""), PairRules()) == Pairs(outcome="open")


def test_answers_that_say_the_same_count_once() -> None:
    same = answers(["Answer: 7", "Answer: 7\n", "So: 7"], ["no", " no", "never"])
    made = pairs_of(rollout(6, answers=same), PairRules())
    assert len(made.pairs) == 4


def test_an_answer_that_was_cut_off_or_is_empty_is_not_learned_from() -> None:
    drawn = (answer("7", correct=True, cut=True), answer("7!", correct=True), answer(" "))
    assert pairs_of(rollout(6, answers=drawn), PairRules()).outcome == "all_correct"
    drawn = (*drawn, answer("on and on and", cut=True))
    assert texts(pairs_of(rollout(6, answers=drawn), PairRules())) == [("7!", "on and on and")]


@pytest.mark.parametrize(
    ("right", "wrong", "entailed"),
    [
        ("Answer: 5", "Answer: 5 apples", True),
        ("Answer: 5", "Answer: about 5.", True),
        ("Answer: 5", "Answer: 15", False),
        ("Answer: 5", "Answer: 5.2", False),
        ("Answer: 5", "Answer: 2.5", False),
        ("Answer: 5", "Answer: 1,500", False),
        ("Answer: 5", "Answer: -5", False),
        ("Answer: 2", "Answer: 1/2", False),
        ("Answer: 1", "Answer: 1/2", False),
        ("Answer: Red", "Answer: a red door", True),
        ("Answer: red", "Answer: reddish", False),
        ("It has 5 legs.\nAnswer: 5", "It has 5 legs.\nAnswer: 6", False),
        (r"\boxed{5}", r"so \boxed{5, 6}", True),
        ("<think>\n5\n</think>\n\n5", "<think>\n5\n</think>\n\n6", False),
        ("<think>\n5\n</think>\n\n5", "<think>\nit is 5", False),
    ],
)
def test_a_rejected_answer_that_contains_the_chosen_one_may_be_right(
    right: str, wrong: str, entailed: bool
) -> None:
    chosen, rejected = answer(right, correct=True), answer(wrong)
    assert is_entailed(chosen, rejected) is entailed
    made = pairs_of(rollout(1, answers=(chosen, rejected)), PairRules())
    assert (made.outcome, made.num_entailed) == (("entailed", 1) if entailed else ("paired", 0))
    made = pairs_of(rollout(1, answers=(chosen, rejected)), PairRules(skip_entailed=False))
    assert len(made.pairs) == 1


def test_what_was_cut_off_has_no_final_answer_to_contain_another() -> None:
    chosen, rejected = answer("Answer: 5", correct=True), answer("it is 5 or 6 or", cut=True)
    assert not is_entailed(chosen, rejected)


def test_entailed_pairs_make_room_for_others() -> None:
    drawn = answers(["Answer: 5"], ["Answer: 5 cm", "Answer: 6", "Answer: 7"])
    made = pairs_of(rollout(4, answers=drawn), PairRules(max_pairs=2))
    assert {rejected for _, rejected in texts(made)} == {"Answer: 6", "Answer: 7"}


@pytest.mark.parametrize("values", [{"max_pairs": 0}, {"seed": -1}])
def test_rules_that_cannot_work_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        PairRules(**values)


def test_good_answers_for_dropout() -> None:
    drawn = (
        answer("a", cut=True),
        answer(" "),
        answer("b"),
        answer("b "),
        answer("c", correct=True),
    )
    open_question = rollout(1, answers=drawn, metric="")
    assert [each.text for each in preferred(open_question, 5)] == ["b", "c"]
    assert [each.text for each in preferred(open_question, 1)] == ["b"]
    assert [each.text for each in preferred(rollout(1, answers=drawn), 5)] == ["c"]


@pytest.mark.parametrize(
    ("text", "share", "first"),
    [
        ("one two three four", 0.5, "one two"),
        ("one two three four", 0.25, "one"),
        ("one two three four", 0.75, "one two three"),
        ("one, two.\nthree", 0.6, "one, two"),
        ("\u4e00\u4e8c\u4e09\u56db", 0.5, "\u4e00\u4e8c"),
        ("word", 0.5, ""),
        ("one two", 0.1, ""),
        ("", 0.5, ""),
    ],
)
def test_the_first_part_of_a_text(text: str, share: float, first: str) -> None:
    assert first_part(text, share) == first


@given(st.text(), st.floats(0.01, 0.99))
def test_the_first_part_begins_the_text_and_leaves_something(text: str, share: float) -> None:
    kept = first_part(text, share)
    assert text.startswith(kept)
    if kept:
        assert text[len(kept) :].strip()
        assert kept == kept.rstrip()


def test_a_longer_share_keeps_more() -> None:
    text = "a bb ccc dddd " * 9
    lengths = [len(first_part(text, share / 10)) for share in range(1, 10)]
    assert all(before < after for before, after in pairwise(lengths))


def test_words_alone() -> None:
    turns = [
        Message.of("system", "Look."),
        Message.of("user", "A: ", SHOWN, "\nB:", SHOWN, SHOWN, "\n\nSame?"),
        Message.of("user", SHOWN, "\n"),
    ]
    assert without_pictures(turns) == (
        Message.of("system", "Look."),
        Message.of("user", "A: ", "B:", "\nSame?"),
        Message("user", ()),
    )
    assert shows_a_picture(turns)
    assert not shows_a_picture(without_pictures(turns))
