"""Answer matching against values worked out by hand, and against arbitrary text."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadevl.scoring import answers

CHOICES = {"A": "red", "B": "green", "C": "red circle"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", "42"),
        ("  42 \n", "42"),
        ("7 + 5 = 12\nAnswer: 12", "12"),
        ("Final answer: blue", "blue"),
        ("Answer: 3\nno, wait\nAnswer: 4\nthat is all", "4"),
        ("**Answer:** 12", "12"),
        ("The answer is 12.", "12."),
        ("<think>\nit may be 3\nAnswer: 3\n</think>\n\n4", "4"),
        ("prefilled thinking</think>4", "4"),
        ("<think> never closed, Answer: 3", ""),
        ("<think>a</think>3<think>again", ""),
        (r"so \boxed{12}", "12"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{3} and \boxed{unclosed", "3"),
        (r"Answer: \boxed{7}", "7"),
        (r"\boxed{unclosed", r"\boxed{unclosed"),
    ],
)
def test_final_answer_is_found(text: str, expected: str) -> None:
    assert answers.final_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" The  Red\tCircle. ", "the red circle"),
        ('"yes"', "yes"),
        ("\uff11\uff12", "12"),
        ("U.S.", "u.s"),
        ("", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert answers.normalise(text) == expected


def test_exact_match_needs_all_of_it() -> None:
    assert answers.exact_match("Yes.", "yes")
    assert not answers.exact_match("yes and no", "yes")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12.0),
        ("-3.5", -3.5),
        ("1,234,567", 1234567.0),
        ("1,23", None),
        ("12%", 12.0),
        ("$4.20", 4.2),
        ("\u22125", -5.0),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("1e999", None),
        ("3/4", 0.75),
        ("3/0", None),
        ("nan", None),
        ("inf", None),
        ("1_000", None),
        ("\u0663", None),
        ("12 apples", None),
        ("", None),
    ],
)
def test_parse_number(text: str, number: float | None) -> None:
    assert answers.parse_number(text) == number


def test_numeric_match_is_close_but_not_lax() -> None:
    assert answers.numeric_match("12.0", "12")
    assert answers.numeric_match("1000.9", "1000")
    assert not answers.numeric_match("1001.1", "1000")
    assert answers.numeric_match("0.001", "0")
    assert not answers.numeric_match("0.002", "0")
    assert not answers.numeric_match("twelve", "12")


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("105", "100", True),
        ("95", "100", True),
        ("105.1", "100", False),
        ("94.9", "100", False),
        ("-95", "-100", True),
        ("95", "-100", False),
        ("0", "0", True),
        ("0.01", "0", False),
        ("10.5%", "10%", True),
        ("Jan", "jan", True),
        ("Jan", "Feb", False),
        ("about 100", "100", False),
    ],
)
def test_relaxed_match(answer: str, truth: str, right: bool) -> None:
    assert answers.relaxed_match(answer, truth) is right


@pytest.mark.parametrize(
    ("answer", "truths", "score"),
    [
        ("hello", ["hello"], 1.0),
        ("helo", ["hello"], 1 - 1 / 5),
        ("HELLO ", ["hello"], 1.0),
        ("ab", ["abcd"], 0.0),  # distance 2 of 4 = 0.5 reaches the threshold
        ("abc", ["abcd"], 0.75),
        ("cat", ["dog", "cats"], 0.75),
        ("", [""], 1.0),
        ("", ["a"], 0.0),
        ("a", [], 0.0),
    ],
)
def test_anls_is_similarity_and_not_distance(answer: str, truths: list[str], score: float) -> None:
    assert answers.anls(answer, truths) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. green", "B"),
        ("B) because A is wrong", "B"),
        ("The answer is B", "B"),
        ("I choose option C, not (A)", "C"),
        ("it must be (B) here", "B"),
        ("(A) or (B)", None),
        ("green", "B"),
        ("It is green.", "B"),
        ("red circle", "C"),
        ("D", None),
        ("A cat", None),
        ("the answer is a circle", None),
        ("<think>A</think>\nB", "B"),
        (r"\boxed{C}", "C"),
        ("", None),
    ],
)
def test_multiple_choice(text: str, letter: str | None) -> None:
    assert answers.multiple_choice(text, CHOICES) == letter
    assert answers.multiple_choice_match(text, "B", CHOICES) is (letter == "B")


def test_lists() -> None:
    assert answers.split_list("A, b;c\nd and e.") == ["a", "b", "c", "d", "e"]
    assert answers.list_match("b, a", "a, b")
    assert not answers.list_match("b, a", "a, b", ordered=True)
    assert not answers.list_match("a, a, b", "a, b")  # a list counts repetitions
    assert answers.list_f1("a, b, x", "a, b, c, d") == pytest.approx(2 * 2 / 7)
    assert answers.list_f1("", "") == 1.0
    assert answers.split_list("sand, land") == ["sand", "land"]


def test_boxes_are_read_with_and_without_tags() -> None:
    box = [(1.0, 2.0, 30.0, 40.5)]
    assert answers.parse_boxes("<ref>cat</ref><box>[[1, 2, 30, 40.5]]</box>") == box
    assert answers.parse_boxes("cat[[1,2,30,40.5]]") == box
    assert answers.parse_boxes("[1, 2, 30, 40.5]") == box
    assert answers.parse_boxes("[[1, 2, 3, 4], [5, 6, 7, 8]]") == [(1, 2, 3, 4), (5, 6, 7, 8)]
    assert answers.parse_boxes("[1, 2, 3]") == []


def test_iou_by_hand() -> None:
    # 10 x 10 and 10 x 10, shifted by 5 in x: 50 common, 150 together.
    assert answers.iou((0.0, 0.0, 10.0, 10.0), (5.0, 0.0, 15.0, 10.0)) == pytest.approx(1 / 3)
    assert answers.iou((0.0, 0.0, 1.0, 1.0), (2.0, 2.0, 3.0, 3.0)) == 0.0
    assert answers.iou((0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)) == 0.0
    assert answers.iou((10.0, 10.0, 0.0, 0.0), (0.0, 0.0, 10.0, 10.0)) == 0.0  # turned inside out


def test_boxes_match_one_to_one() -> None:
    truth = "[[0, 0, 10, 10], [20, 0, 30, 10]]"
    assert answers.boxes_match("[[20, 0, 30, 9], [0, 0, 10, 9]]", truth)
    assert not answers.boxes_match("[[0, 0, 10, 10], [0, 0, 10, 9]]", truth)  # one seen twice
    assert not answers.boxes_match("[[0, 0, 10, 10]]", truth)
    assert not answers.boxes_match("", "")
    assert answers.boxes_match("[0, 0, 10, 5]", "[0, 0, 10, 10]")  # exactly one half
    assert not answers.boxes_match("[0, 0, 10, 4.9]", "[0, 0, 10, 10]")


def test_boxes_match_moves_an_earlier_choice() -> None:
    # The first true box overlaps both answers, the second only the one the first would take.
    truth = "[[0, 0, 10, 10], [0, 0, 10, 6]]"
    assert answers.boxes_match("[[0, 0, 10, 7], [0, 0, 10, 14]]", truth)


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"$\frac{2}{4}$", r"\frac{1}{2}", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        ("x+1", "1+x", True),
        ("12", "13", False),
        (r"\frac{1}{3}", "0.5", False),
        ("", "", True),
        ("", "1", False),
        ("9^{9^{9^9}}", "1", False),
        ("1" + "0" * 300, "1", False),
    ],
)
def test_math_match(answer: str, truth: str, right: bool) -> None:
    assert answers.math_match(answer, truth) is right


def test_math_match_works_outside_the_main_thread() -> None:
    results: list[bool] = []
    worker = threading.Thread(
        target=lambda: results.append(answers.math_match(r"\frac{1}{2}", r"\frac{2}{4}"))
    )
    worker.start()
    worker.join()
    assert results == [True]


HOSTILE = st.text(max_size=80) | st.text(
    alphabet="0123456789+-*/^!(){}[]\\.,=% abxA<>", max_size=60
)


@given(HOSTILE, HOSTILE)
@settings(max_examples=300, deadline=None)
def test_no_text_raises(left: str, right: str) -> None:
    answers.final_answer(left)
    answers.normalise(left)
    answers.parse_number(left)
    answers.exact_match(left, right)
    answers.numeric_match(left, right)
    answers.relaxed_match(left, right)
    assert 0.0 <= answers.anls(left, [right]) <= 1.0
    assert answers.multiple_choice(left, {"A": right, "B": left}) in (None, "A", "B")
    assert 0.0 <= answers.list_f1(left, right) <= 1.0
    answers.list_match(left, right)
    answers.parse_boxes(left)
    answers.boxes_match(left, right)


@given(st.text(alphabet="0123456789+-*/^!(){}\\.,=%xfracsqrt ", max_size=24))
@settings(max_examples=60, deadline=None)
def test_no_formula_raises(text: str) -> None:
    answers.math_match(text, "12")


@given(st.text(max_size=30))
def test_everything_matches_itself(text: str) -> None:
    assert answers.exact_match(text, text)
    assert answers.anls(text, [text]) == 1.0
    assert answers.list_match(text, text)


@pytest.mark.parametrize("piece", ["\\boxed{", "answer ", "answer\t \n", "[1,", "<think>", "1,111"])
def test_long_hostile_texts_are_read_in_no_time(piece: str) -> None:
    text = piece * 20_000
    start = time.process_time()
    answers.final_answer(text)
    answers.parse_number(text)
    answers.parse_boxes(text)
    answers.multiple_choice(text, CHOICES)
    assert time.process_time() - start < 2.0  # quadratic time would be minutes


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("International", "international", True),
        ("Internationa1", "international", True),  # one letter of thirteen
        ("helo", "hello", False),  # one of five: 0.8
        ("", "hello", False),
    ],
)
def test_anls_above_nine_tenths_is_right(answer: str, truth: str, right: bool) -> None:
    assert answers.anls_match(answer, truth) is right


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Red door", "red door"),
        ("two dogs.", "2 dogs"),
        ("none", "0"),
        ("Don't!", "dont"),
        ("don\u2019t", "dont"),
        ("1,000", "1000"),
        ("3.5 m", "3.5 m"),
        ("p.m.", "pm"),
        ("black-and-white", "black and white"),
        ("a", ""),
    ],
)
def test_normalise_vqa(text: str, expected: str) -> None:
    assert answers.normalise_vqa(text) == expected


def leaving_each_out(answer: str, truths: list[str]) -> float:
    """VQA's accuracy as its authors write it: over all people, each compared with the others."""
    scores = []
    for left_out in range(len(truths)):
        others = truths[:left_out] + truths[left_out + 1 :]
        scores.append(min(1.0, sum(truth == answer for truth in others) / 3))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("agreeing", range(11))
def test_vqa_accuracy_equals_the_loops(agreeing: int) -> None:
    truths = ["red"] * agreeing + ["blue"] * (10 - agreeing)
    expected = leaving_each_out("red", truths)
    assert answers.vqa_accuracy("The red", truths) == pytest.approx(expected, abs=1e-12)


def test_one_reference_has_to_be_met() -> None:
    assert answers.vqa_accuracy("two", ["2"]) == 1.0
    assert answers.vqa_accuracy("two", ["3"]) == 0.0
    assert answers.vqa_accuracy("two", []) == 0.0
    assert answers.vqa_match("the two", "2")
    assert not answers.vqa_match("3", "2")


@given(st.sampled_from(sorted(answers.MATCHERS)), st.text(max_size=40), st.text(max_size=40))
@settings(max_examples=300)
def test_no_way_of_matching_raises(name: str, answer: str, truth: str) -> None:
    assert answers.MATCHERS[name](answer, truth) in (True, False)


@pytest.mark.parametrize("name", sorted(set(answers.MATCHERS) - {"box"}))
def test_the_truth_itself_is_right_by_any_name(name: str) -> None:
    assert answers.MATCHERS[name]("12", "12")
    assert not answers.MATCHERS[name]("40", "12")
