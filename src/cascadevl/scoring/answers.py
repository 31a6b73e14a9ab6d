"""Is this answer right? Pure functions of strings that never raise, whatever a model wrote.

The ways of matching are those of the reports' preference and RL data (MMPR, arXiv 2411.10442:
exact, VQA, relaxed 5 %, ANLS, multiple choice, mathematical equality) plus lists and boxes.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from rapidfuzz.distance import Levenshtein

RELAXED_TOLERANCE = 0.05
"""ChartQA's relaxed accuracy: a number may be off by this share of the truth."""

ANLS_THRESHOLD = 0.5
"""From this normalised distance on an answer scores 0 (ST-VQA, arXiv 1907.00490)."""

CORRECT_ABOVE = 0.9
"""From a score to right or wrong, where a way of matching gives one (public code of MMPR)."""

# Blanks are counted: unbounded ones beside each other take quadratic time on hostile text.
_MARKER = re.compile(r"\banswer\s{0,3}(?:is\s{0,3}:?|:)\s*([^\n]*)", re.IGNORECASE)
_BRACE = re.compile(r"\\boxed\{|[{}]")
_NUMBER = re.compile(
    r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:e[-+]?[0-9]{1,3})?"
    r"|[-+]?\.[0-9]+",
    re.IGNORECASE,
)
_FRACTION = re.compile(r"([-+]?[0-9]{1,15})\s*/\s*([0-9]{1,15})")
_BOX_NUMBER = r"\s*(-?[0-9]{1,6}(?:\.[0-9]{1,9})?)\s*"
_BOX = re.compile(rf"\[{_BOX_NUMBER},{_BOX_NUMBER},{_BOX_NUMBER},{_BOX_NUMBER}\]")
_LETTER_FIRST = re.compile(r"\s*[(\[]?([A-Z])(?:[)\].:,]|\s*$)")
_LETTER_NAMED = re.compile(
    r"\b(?i:answer|option|choice)\s{0,3}(?:is|:)?\s{0,3}:?\s{0,3}[(\[]?([A-Z])(?![A-Za-z])"
)
_SECOND_LETTER = re.compile(r"[)\]]?\s{0,3}(?:or|and|/|&|,)\s{0,3}[(\[]?([A-Z])(?![A-Za-z])")
_LETTER_BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")
_SEPARATOR = re.compile(r"[,;\n]|\band\b", re.IGNORECASE)
_MAX_MATH_CHARACTERS = 256
_EXPLOSIVE = re.compile(
    r"(?:\^|\*\*)\s*[{(]?\s*-?(?:[0-9]{4,}|[^^*]{0,40}(?:\^|\*\*))|![!(]*|[0-9]{40,}"
)


def final_answer(text: str) -> str:
    r"""The part of a response that is its answer.

    What comes after the last ``</think>``; in it the last complete ``\boxed{...}``, else the rest
    of the line after the last ``Final answer:``, ``Answer:`` or ``answer is``, else all of it.
    A response whose last thinking was opened and never closed has no answer: the result is empty.
    """
    after = text.rpartition("</think>")[2]
    if "<think>" in after:
        return ""
    boxed = last_boxed(after)
    if boxed is not None:
        return boxed.strip()
    marked = _MARKER.findall(after)
    return (marked[-1] if marked else after).strip().strip("*").strip()


def last_boxed(text: str) -> str | None:
    r"""Content of the complete ``\boxed{...}`` that opens last, None without one.

    One pass, whatever the nesting.
    """
    open_braces: list[tuple[int, bool]] = []
    last = (-1, -1)
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            open_braces.append((brace.end(), brace[0] != "{"))
        elif open_braces:
            start, is_box = open_braces.pop()
            if is_box and start > last[0]:
                last = (start, brace.start())
    return text[last[0] : last[1]] if last[0] >= 0 else None


def normalise(text: str) -> str:
    """Lower case, one blank between words, no quotes around and no full stop at the end."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(words).strip("\"'` ").removesuffix(".").strip("\"'` ")


def exact_match(answer: str, truth: str) -> bool:
    """Equal after `normalise`."""
    return normalise(answer) == normalise(truth)


def parse_number(text: str) -> float | None:
    """The number that a text consists of, or None.

    Thousands separators, one currency sign in front, a per cent sign behind (ignored, so "12%" is
    12), a trailing full stop and simple fractions are understood; units and words are not.
    """
    bare = normalise(text).replace("\u2212", "-").removesuffix("%").strip()
    bare = bare.removeprefix("$").removeprefix("\u20ac").removeprefix("\u00a3").strip()
    fraction = _FRACTION.fullmatch(bare)
    if fraction:
        below = float(fraction[2])
        return float(fraction[1]) / below if below else None
    if not _NUMBER.fullmatch(bare) or len(bare) > 40:
        return None
    number = float(bare.replace(",", ""))
    return number if abs(number) < float("inf") else None


def numeric_match(answer: str, truth: str, *, tolerance: float = 1e-3) -> bool:
    """Both are numbers, and differ by at most ``tolerance`` times the truth's size (or 1)."""
    given, expected = parse_number(answer), parse_number(truth)
    if given is None or expected is None:
        return False
    return abs(given - expected) <= tolerance * max(1.0, abs(expected))


def relaxed_match(answer: str, truth: str, *, tolerance: float = RELAXED_TOLERANCE) -> bool:
    """ChartQA's rule: numbers within ``tolerance`` of the truth, everything else exact.

    A truth of 0 must be met exactly. Whole numbers such as years are numbers too, so ask for
    them with `exact_match`.
    """
    given, expected = parse_number(answer), parse_number(truth)
    if given is None or expected is None:
        return exact_match(answer, truth)
    return abs(given - expected) <= tolerance * abs(expected) + 1e-12


def anls(answer: str, truths: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity to the nearest truth, in 0 to 1.

    1 - distance / length of the longer one; 0 where that distance reaches `ANLS_THRESHOLD`.
    """
    return max((_similarity(normalise(answer), normalise(truth)) for truth in truths), default=0.0)


def _similarity(left: str, right: str) -> float:
    longer = max(len(left), len(right))
    distance = Levenshtein.distance(left, right) / longer if longer else 0.0
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


def anls_match(answer: str, truth: str) -> bool:
    """Whether the similarity is above `CORRECT_ABOVE`: one letter in eleven may be wrong."""
    return anls(answer, [truth]) > CORRECT_ABOVE


_VQA_DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"}
_VQA_DIGITS |= {"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_VQA_APOSTROPHE = re.compile("['\u2019]")
_VQA_POINT = re.compile(r"(?<![0-9])\.|\.(?![0-9])|(?<=[0-9]),(?=[0-9])")
_VQA_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!]")


def normalise_vqa(text: str) -> str:
    """As VQA answers are compared: no articles and punctuation, number words as digits.

    The official table of contractions is replaced by leaving out every apostrophe.
    """
    bare = _VQA_POINT.sub("", _VQA_APOSTROPHE.sub("", normalise(text)))
    words = _VQA_PUNCTUATION.sub(" ", bare).split()
    return " ".join(_VQA_DIGITS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """VQA accuracy, in 0 to 1: as many as three people agree (VQA, arXiv 1505.00468).

    Args:
        answer: What is scored.
        truths: What people answered: ten of them, each left out once and the results averaged;
            or one reference, which has to be met.
    """
    given = normalise_vqa(answer)
    agreeing = sum(normalise_vqa(truth) == given for truth in truths)
    if len(truths) < 2:
        return float(agreeing)
    with_one_less = agreeing * min(1.0, (agreeing - 1) / 3)
    return (with_one_less + (len(truths) - agreeing) * min(1.0, agreeing / 3)) / len(truths)


def vqa_match(answer: str, truth: str) -> bool:
    """Equal after `normalise_vqa`."""
    return vqa_accuracy(answer, [truth]) > CORRECT_ABOVE


def multiple_choice(text: str, choices: Mapping[str, str]) -> str | None:
    """The letter a response chose, or None where it chose none.

    Looked for in this order: a letter that opens the answer ("B", "(B)", "B. circle"), one that
    is named ("the answer is B", "option C"), one in brackets, the text of exactly one choice as
    the whole answer, the text of exactly one choice somewhere in it. Two letters joined ("A or
    B") are no choice.

    Args:
        text: A whole response, or its `final_answer`.
        choices: Text of each choice by its capital letter.
    """
    answer = final_answer(text)
    for found in (_LETTER_FIRST.match(answer), _LETTER_NAMED.search(answer)):
        if found and found[1] in choices:
            second = _SECOND_LETTER.match(answer, found.end(1))
            return None if second and second[1] in choices else str(found[1])
    bracketed = {letter for letter in _LETTER_BRACKETED.findall(answer) if letter in choices}
    if len(bracketed) == 1:
        return str(bracketed.pop())
    return _choice_by_text(normalise(answer), choices)


def _choice_by_text(answer: str, choices: Mapping[str, str]) -> str | None:
    texts = {letter: normalise(text) for letter, text in choices.items()}
    equal = [letter for letter, text in texts.items() if text == answer]
    if len(equal) == 1:
        return equal[0]
    named = [
        letter
        for letter, text in texts.items()
        if text and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer)
    ]
    return named[0] if len(named) == 1 else None


def multiple_choice_match(text: str, truth: str, choices: Mapping[str, str]) -> bool:
    """Whether the response chose the letter ``truth``."""
    return multiple_choice(text, choices) == truth.strip().upper()


def split_list(text: str) -> list[str]:
    """The normalised items of a list written with commas, semicolons, lines or "and"."""
    return [item for piece in _SEPARATOR.split(text) if (item := normalise(piece))]


def list_match(answer: str, truth: str, *, ordered: bool = False) -> bool:
    """The same items, as often each; their order counts only if ``ordered``."""
    given, expected = split_list(answer), split_list(truth)
    return given == expected if ordered else Counter(given) == Counter(expected)


def list_f1(answer: str, truth: str) -> float:
    """F1 of the items, order ignored; two empty lists agree fully."""
    given, expected = Counter(split_list(answer)), Counter(split_list(truth))
    total = given.total() + expected.total()
    return 2 * (given & expected).total() / total if total else 1.0


Box = tuple[float, float, float, float]
"""x1, y1, x2, y2."""


def parse_boxes(text: str) -> list[Box]:
    """All ``[x1, y1, x2, y2]`` of a text, with or without the ``<box>`` tags around them.

    Released tokenizers delete the tags from decoded text, so they cannot be relied on.
    """
    boxes = []
    for groups in _BOX.findall(text):
        left, top, right, bottom = (float(number) for number in groups)
        boxes.append((left, top, right, bottom))
    return boxes


def iou(left: Box, right: Box) -> float:
    """Intersection over union of two boxes; 0 where either has no area."""
    width = min(left[2], right[2]) - max(left[0], right[0])
    height = min(left[3], right[3]) - max(left[1], right[1])
    both = max(0.0, width) * max(0.0, height)
    union = _area(left) + _area(right) - both
    return both / union if both > 0 and union > 0 else 0.0


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def boxes_match(answer: str, truth: str, *, threshold: float = 0.5) -> bool:
    """Each true box has an answered box of its own with enough overlap, and none is left over."""
    given, expected = parse_boxes(answer), parse_boxes(truth)
    if not expected or len(given) != len(expected):
        return False
    fits = [[iou(box, other) >= threshold for other in given] for box in expected]
    taken: dict[int, int] = {}
    return all(_assign(number, fits, taken, set()) for number in range(len(expected)))


def _assign(
    number: int, fits: Sequence[Sequence[bool]], taken: dict[int, int], tried: set[int]
) -> bool:
    """Give a true box an answered one, moving earlier ones on if needed (augmenting path)."""
    for other, fit in enumerate(fits[number]):
        if fit and other not in tried:
            tried.add(other)
            if other not in taken or _assign(taken[other], fits, taken, tried):
                taken[other] = number
                return True
    return False


def math_match(answer: str, truth: str) -> bool:
    r"""Mathematically equal, as math-verify sees it: ``1/2``, ``0.5`` and ``\frac{1}{2}`` agree.

    Texts that are equal or equal numbers agree without it. Very long texts, towers of powers and
    factorials are refused, because outside the main thread nothing could stop their evaluation.
    """
    if exact_match(answer, truth) or numeric_match(answer, truth, tolerance=1e-9):
        return True
    if any(_too_costly(text) for text in (answer, truth)):
        return False
    from math_verify import parse, verify  # sympy takes a second to import

    # The library's time limit is a signal, which only the main thread may set.
    limit_s = 5 if threading.current_thread() is threading.main_thread() else None
    expected, given = (
        parse(f"${text.strip().strip('$')}$", parsing_timeout=limit_s) for text in (truth, answer)
    )
    return bool(verify(expected, given, timeout_seconds=limit_s))


def _too_costly(text: str) -> bool:
    return (
        not text.strip() or len(text) > _MAX_MATH_CHARACTERS or _EXPLOSIVE.search(text) is not None
    )


MATCHERS: Mapping[str, Callable[[str, str], bool]] = {
    "exact": exact_match,
    "number": numeric_match,
    "relaxed": relaxed_match,
    "anls": anls_match,
    "vqa": vqa_match,
    "list": list_match,
    "box": boxes_match,
    "math": math_match,
}
"""Ways of matching by the names that data files give them, of final answer and truth. Multiple
choice also needs the choices (`multiple_choice_match`)."""
