"""Filters of worked solutions: each fault on a text that has it, and on near misses that do not."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadevl.scoring.answers import exact_match, final_answer
from cascadevl.scoring.reasoning import (
    FAULTS,
    Rules,
    Solution,
    choose,
    distinct,
    fault_of,
    judge_question,
    judge_score,
    repetition,
    take_apart,
)

QUESTION = "What is 27 + 45?"
STEPS = "Ones: 7 + 5 = 12, carry 1. Tens: 2 + 4 + 1 = 7."
GOOD = f"<think>\n{STEPS}\n</think>\n\n72"


def is_72(text: str) -> bool:
    return exact_match(final_answer(text), "72")


def fault(text: str, question: str = QUESTION, finished: bool = True, **rules: object) -> str:
    found = fault_of(text, question=question, check=is_72, rules=Rules(**rules), finished=finished)
    return found or "good"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, "good"),
        (f"  <think>{STEPS}</think>72\n", "good"),
        ("", "no_reply"),
        (" \n", "no_reply"),
        ("72", "no_thinking"),
        ("<thinking>x</thinking>72", "no_thinking"),
        (f"<think>\n{STEPS}", "unclosed_thinking"),
        (f"</think>{STEPS}<think>72", "unclosed_thinking"),
        (f"{STEPS}\n</think>\n\n72", "unopened_thinking"),
        (f"<think>\n{STEPS}\n</think>\n<think>\n</think>\n72", "several_blocks"),
        (f"<think>\n<think>\n{STEPS}\n</think>\n72", "several_blocks"),
        (f"Sure! <think>\n{STEPS}\n</think>\n72", "text_before"),
        ("<think>\n\n</think>\n\n72", "empty_thinking"),
        (f"<think>\n{STEPS}\n</think>\n\n", "no_answer"),
        (f"<think>\n{STEPS}\n</think>\n\n71", "wrong_answer"),
        (f"<think>\n{STEPS} So 72.\n</think>\n\nI do not know.", "wrong_answer"),
    ],
)
def test_form_and_answer(text: str, expected: str) -> None:
    assert fault(text) == expected


def test_the_parts_are_bare() -> None:
    assert take_apart(GOOD) == Solution(STEPS, "72")
    without_opening = GOOD.removeprefix("<think>")
    assert take_apart(without_opening, Rules(opening_optional=True)) == Solution(STEPS, "72")
    assert fault(without_opening) == "unopened_thinking"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("72", "no_box"),
        ("The sum is \\boxed{72}.", "good"),
        ("The sum is \\boxed{72", "no_box"),
        ("\\boxed{71}", "wrong_answer"),
    ],
)
def test_a_box_where_one_is_asked_for(answer: str, expected: str) -> None:
    assert fault(f"<think>\n{STEPS}\n</think>\n\n{answer}", boxed=True) == expected


def test_a_box_in_the_thinking_is_not_one_in_the_answer() -> None:
    assert fault(f"<think>\n{STEPS} \\boxed{{72}}\n</think>\n\n72", boxed=True) == "no_box"


# -- redundancy


def repetition_by_hand(words: list[str], ngram: int) -> float:
    """Every sequence against every other: no counter, no tuples."""
    grams = [" ".join(words[at : at + ngram]) for at in range(len(words) - ngram + 1)]
    repeated = [gram for gram in grams if grams.count(gram) > 1]
    return len(repeated) / len(grams) if grams else 0.0


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=30), st.integers(1, 10))
def test_repetition_equals_the_loops(words: list[str], ngram: int) -> None:
    assert repetition(" ".join(words), ngram) == repetition_by_hand(words, ngram)


def test_repetition_on_paper() -> None:
    # Ten different words, twice: of 11 sequences the first and the last are the same.
    words = "one two three four five six seven eight nine ten"
    assert repetition(words) == 0.0
    assert repetition(f"{words} {words}") == pytest.approx(2 / 11)
    # Three times: 21 sequences; 1, 11 and 21 are the same, and so are 2 to 10 and 12 to 20.
    assert repetition(f"{words} {words} {words}") == pytest.approx(21 / 21)
    assert repetition("too short to repeat") == 0.0


def test_signs_and_east_asian_characters_are_words() -> None:
    assert repetition("再算一遍" * 10) == 1.0
    assert repetition("1+1=2," * 10) == 1.0


def test_the_limit_is_above_four_tenths() -> None:
    loop = "wait, let me check the sum of the two numbers again. "
    assert fault(f"<think>\n{STEPS} {loop * 8}\n</think>\n\n72") == "repetitive"
    assert fault(f"<think>\n{STEPS} {loop}\n</think>\n\n72") == "good"
    text = f"<think>\n{STEPS} {loop * 8}\n</think>\n\n72"
    assert fault(text, max_repetition=repetition(text)) == "good"


# -- clarity


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [
        ("Yes.", "too_short"),
        ("7 + 5 = 12", "good"),
        ("7 + 5 = 12, carry", "good"),
        ("7 + 5 = 12,", "cut_off"),
        ("Add the ones:", "cut_off"),
        ("The carry is one, so", "cut_off"),
        ("The sum is (7 + 5", "good"),
        ("so it is \\boxed{7", "cut_off"),
        ("```python\nprint(27 + 45)", "cut_off"),
        ("```python\nprint(27 + 45)\n```", "good"),
        ("It gives \ufffd\ufffd twelve.", "garbled"),
        ("It gives \x07 twelve.", "garbled"),
        ("It gives twelve <|im_end|> and so on.", "garbled"),
        ("The picture <img> shows it.", "garbled"),
        ("It\u2019s caf\u00c3\u00a9 twelve.", "garbled"),
        (f"It gives {'1' * 30} in all.", "garbled"),
        (f"A line:\n{'-' * 40}\nand twelve.", "good"),
        ("A tab\tand\r\nlines are fine.", "good"),
        ("先算个位, 七加五等于十二。", "mixed_languages"),
        ("The angle \u03b1 + \u03b2 is twelve.", "good"),
        ("Seven plus five, \u5341, is twelve, carry one to the tens column.", "good"),
        (f"{STEPS} The answer is 72.", "good"),
        (f"{STEPS} The answer is seventy-two, that is 72, since it fits.", "good"),
        (f"{STEPS} The answer is 62.", "other_answer"),
        (f"{STEPS} Final answer:\n62", "other_answer"),
        (f"{STEPS} \\boxed{{62}}", "other_answer"),
        (f"{STEPS} So the answer is not 62.", "good"),
        ("The answer is 62. No: " + STEPS + " The answer is 72.", "good"),
        (f"{STEPS} Final answer:", "cut_off"),
    ],
)
def test_clarity_of_thinking(thinking: str, expected: str) -> None:
    assert fault(f"<think>\n{thinking}\n</think>\n\n72") == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The answer is 72", "good"),
        ("As shown above, the answer is 72", "refers_to_thinking"),
        ("From my reasoning, the answer is 72", "refers_to_thinking"),
        ("It lies above the line. Answer: 72", "good"),
        ("Answer: 72" + " really" * 5, "wrong_answer"),
        ("so \\boxed{72} and", "cut_off"),
    ],
)
def test_clarity_of_answers(answer: str, expected: str) -> None:
    assert fault(f"<think>\n{STEPS}\n</think>\n\n{answer}") == expected


def test_limits_on_length() -> None:
    assert fault(GOOD, max_words=10) == "too_long"
    assert fault(GOOD, min_words=1000) == "too_short"
    long = f"<think>\n{STEPS}\n</think>\n\n" + "Now this is said at length. " * 3 + "\nAnswer: 72"
    assert fault(long) == "good"
    assert fault(long, max_answer_words=20) == "long_answer"


def test_a_solution_stopped_at_the_limit_is_cut_off() -> None:
    assert fault(GOOD, finished=False) == "cut_off"


def test_languages_of_the_question_are_allowed() -> None:
    chinese = "<think>\n先算个位, 七加五等于十二。\n</think>\n\n72"
    assert fault(chinese) == "mixed_languages"
    assert fault(chinese, question="二十七加四十五是多少?") == "good"
    assert fault(GOOD, question="二十七加四十五是多少?") == "good"  # Latin is at home everywhere
    russian = "<think>\n\u0421\u0435\u043c\u044c \u0438 пять будет двенадцать.\n</think>\n\n72"
    assert fault(russian, question="二十七加四十五是多少?") == "mixed_languages"
    assert fault(chinese, question="27 + 45 = ?") == "good"  # no letters to compare with
    assert fault(chinese, max_foreign=1.0) == "good"


def test_the_first_reason_counts() -> None:
    """A wrong answer that also repeats itself is counted as wrong."""
    assert fault(f"<think>\n{'no way ' * 50}\n</think>\n\n71") == "wrong_answer"


@given(st.text(max_size=200))
def test_whatever_is_written_has_a_fault_or_none(text: str) -> None:
    assert fault(f"<think>{text}</think>{text}") in {*FAULTS, "good"}
    assert fault(text) in {*FAULTS, "good"}


# -- choosing


def test_words_alike_are_one_solution() -> None:
    assert distinct(["7 + 5 = 12", "7+5 = 12", "7 + 5 = 12.", "12 = 7 + 5"]) == [0, 2, 3]
    assert distinct([]) == []


TEXTS = [
    "first add the ones and then add the tens and then you have it",
    "first add the ones and then add the tens and then it is there",
    "count up from the larger number until done",
    "add ones and then add the tens",
]


def test_the_shortest_are_chosen() -> None:
    assert choose(TEXTS, 2) == [3, 2]
    assert choose(TEXTS, 9) == [3, 2, 0, 1]
    assert choose([], 2) == []


def test_the_most_different_are_chosen() -> None:
    def triples(text: str) -> Counter[str]:
        words = text.split()
        return Counter(" ".join(words[at : at + 3]) for at in range(len(words) - 2))

    def alike(left: int, right: int) -> float:
        one, two = set(triples(TEXTS[left])), set(triples(TEXTS[right]))
        return len(one & two) / len(one | two)

    # The shortest first; nothing is like the counting; of the others the less similar.
    assert alike(2, 3) == 0.0
    assert alike(0, 3) == alike(1, 3)
    assert choose(TEXTS, 3, "diverse") == [3, 2, 0]
    assert choose(TEXTS, 2, "diverse") == [3, 2]
    assert choose(["b b b b", "a"], 2, "diverse") == [1, 0]


# -- the judge


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Clear and short.\nScore: 8", 8.0),
        ("**Score:** 7.5", 7.5),
        ("score = 10", 10.0),
        ("Score: 3 for the start, but then\nScore: 9/10", 9.0),
        ("9", 9.0),
        (" 6/10.", 6.0),
        ("<think>Score: 1?</think>Score: 8", 8.0),
        ("Score: 85", None),
        ("Score: 100", None),
        ("Score: high", None),
        ("It has 3 steps.", None),
        ("", None),
    ],
)
def test_scores_of_a_judge(reply: str, score: float | None) -> None:
    assert judge_score(reply) == score


def test_the_judge_sees_question_and_solution() -> None:
    asked = judge_question("What is {x}?", "<think>\n{y}\n</think>\n\n5")
    assert "What is {x}?" in asked
    assert "<think>\n{y}\n</think>\n\n5" in asked
    assert asked.endswith("Score: <number from 0 to 10>")
