"""What answers claim, and what is asked to check it."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadevl.scoring.claims import asked_question, claims_of, claims_of_lines, existence_question

LISTED = [
    ("2 shapes: red circle top left, orange star right.", "", [
        ("2 shapes", "Are there 2 shapes?"),
        ("red circle top left", "Is there a red circle?"),
        ("orange star right", "Is there an orange star?"),
    ]),
    ("- a red car\n- traffic lights\n12. An apple", "List it.", [
        ("a red car", "Is there a red car?"),
        ("traffic lights", "Are there traffic lights?"),
        ("An apple", "Is there an apple?"),
    ]),
    ("In the image, there is a dog, a cat and two birds.", "Describe.", [
        ("there is a dog", "Is there a dog?"),
        ("a cat", "Is there a cat?"),
        ("two birds", "Are there two birds?"),
    ]),
    ("The picture shows a man riding a horse, while the sky is blue; it is 3.5 m tall.", "", [
        ("The picture shows a man riding a horse", "Is there a man riding a horse?"),
        ("the sky is blue", "Is the sky blue?"),
        ("it is 3.5 m tall", "Is the sky 3.5 m tall?"),
    ]),
    ("The tower was built in 1889 and it was designed by Eiffel. They are tall.", "", [
        ("The tower was built in 1889", "Was the tower built in 1889?"),
        ("it was designed by Eiffel", "Was the tower designed by Eiffel?"),
        ("They are tall", "Are they tall?"),
    ]),
    ("I see an elephant. It has a long trunk", "", [
        ("I see an elephant", "Is there an elephant?"),
        ("It has a long trunk", "Does the elephant have a long trunk?"),
    ]),
    ("Mr. Smith is here, e.g. in 3.5 rooms.", "", [
        ("Mr. Smith is here, e.g. in 3.5 rooms", "Is Mr. Smith here, e.g. in 3.5 rooms?"),
    ]),
    ("red", "What color is the circle?", [("red", "Is the circle red?")]),
    ("3", "How many red circles are there?", [("3", "Is the number of red circles 3?")]),
    ("top left", "Where is the star?", [("top left", "Is the star top left?")]),
    ("black and white dog", "What is in the picture?", [
        ("black and white dog", "Is there a black and white dog?"),
    ]),
    ("One two.\nAnswer: 12", "What number is written?", [
        ("One two", 'Is "One two" the right answer to the question "What number is written?"?'),
        ("12", 'Is "12" the right answer to the question "What number is written?"?'),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "asked", "expected"), LISTED, ids=lambda each: str(each)[:30])
def test_claims_and_their_questions(answer: str, asked: str, expected: list[tuple[str, str]]):
    claims = claims_of(answer, asked)
    assert [(claim.text, claim.question) for claim in claims] == expected
    assert all(answer[slice(*claim.span)] == claim.text for claim in claims if claim.span)
    assert not any(claim.is_negative for claim in claims)


NEGATIVE = [
    ("There is no dog.", "Is there a dog?"),
    ("There isn't a dog.", "Is there a dog?"),
    ("There are no dogs", "Are there dogs?"),
    ("I see no dog", "Is there a dog?"),
    ("The dog is not brown.", "Is the dog brown?"),
    ("The man has no hat.", "Does the man have a hat?"),
]


@pytest.mark.parametrize(("answer", "question"), NEGATIVE)
def test_what_is_denied_is_asked_positively(answer: str, question: str):
    (claim,) = claims_of(answer)
    assert (claim.question, claim.is_negative) == (question, True)


@pytest.mark.parametrize(
    ("answer", "is_negative", "opposite"),
    [("yes", False, "no"), ("No", True, "Yes"), ("Yes, indeed", False, "No")],
)
def test_a_reply_claims_what_was_asked(answer: str, is_negative: bool, opposite: str):
    asked = "Look.\nIs there a red circle in the image? Please answer yes or no."
    claim = claims_of(answer, asked)[0]
    assert claim.question == "Is there a red circle in the image?"
    assert (claim.is_negative, claim.opposite) == (is_negative, opposite)
    assert claim.span is not None
    assert answer[slice(*claim.span)] == claim.text


def test_after_a_reply_the_rest_is_read():
    claims = claims_of("No, there is a cat.", "Is there a dog?")
    assert [claim.text for claim in claims] == ["No", "there is a cat"]


@pytest.mark.parametrize(
    "answer",
    ["", "...", "Sure!", "What do you mean?", "Here are the objects:", "<think>There is a dog."],
)
def test_what_claims_nothing(answer: str):
    assert claims_of(answer, "What is it?") == []


def test_reasoning_claims_nothing_and_places_are_those_of_the_whole_answer():
    answer = "<think>There is a dog.</think>\nThere is a cat."
    (claim,) = claims_of(answer)
    assert claim.text == "There is a cat"
    assert answer[slice(*claim.span or (0, 0))] == claim.text


def test_the_question_of_a_turn():
    assert asked_question("Image-1:\nLook here. What is it? Answer briefly.") == "What is it?"
    assert asked_question("Describe it.") == ""


@pytest.mark.parametrize(
    ("thing", "question"),
    [
        ("the red circle", "Is there a red circle?"),
        ("one apple", "Is there an apple?"),
        ("1 apple", "Is there an apple?"),
        ("grass", "Is there a grass?"),
        ("10 dogs", "Are there 10 dogs?"),
        ("some trees", "Are there some trees?"),
    ],
)
def test_things_in_questions(thing: str, question: str):
    assert existence_question(thing) == question


def test_claims_that_a_model_wrote_are_found_in_the_answer():
    answer = "A dog sits there; the sky is blue."
    claims = claims_of_lines("1. There is a dog.\n- the sky is blue\n\nsure", answer)
    assert [(claim.question, claim.span) for claim in claims] == [
        ("Is there a dog?", None),
        ("Is the sky blue?", (18, 33)),
    ]


@given(st.text(alphabet="ab .,;:!?\n-*1and the is no I see <think>", max_size=200), st.text())
def test_any_answer_can_be_read(answer: str, asked: str):
    for claim in claims_of(answer, asked):
        assert claim.question
        assert claim.span is not None
        assert answer[slice(*claim.span)] == claim.text


@pytest.mark.parametrize("piece", ["a ", "the a is ", ", and the ", "there is ", ". ", "is it? "])
def test_hostile_answers_take_little_time(piece: str):
    start = time.perf_counter()
    claims_of(piece * 5_000, piece * 5_000)
    assert time.perf_counter() - start < 5
