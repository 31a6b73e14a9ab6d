r"""Which worked solutions are fit to be learned from: format, answer, redundancy, clarity.

InternVL3.5 keeps of sampled solutions those whose answer is right and whose thinking is clear, not
redundant and consistent in format (InternVL3.5 report, section 3.5). The report gives no rules;
these are ours, each with a name under which rejected solutions are counted. The limit on repetition
is InternVL2.5's (report 2412.05271, data filtering).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from cascadevl.scoring.answers import last_boxed
from cascadevl.scoring.clarity import clarity_fault, words_of

Fault: TypeAlias = Literal[
    "no_reply",
    "no_thinking",
    "several_blocks",
    "unopened_thinking",
    "unclosed_thinking",
    "text_before",
    "empty_thinking",
    "no_answer",
    "no_box",
    "wrong_answer",
    "repetitive",
    "cut_off",
    "too_short",
    "too_long",
    "long_answer",
    "garbled",
    "mixed_languages",
    "other_answer",
    "refers_to_thinking",
]
"""Why a solution is not used, in the order in which it is looked at."""

FAULTS: tuple[str, ...] = get_args(Fault)

Choice: TypeAlias = Literal["shortest", "diverse"]
"""Which of several good solutions are kept."""

_OPEN, _CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    r"""What a solution must be like.

    Attributes:
        boxed: The answer must hold a complete ``\boxed{...}``.
        opening_optional: A missing ``<think>`` is put there: some servers make it part of the
            prompt, so that answers begin after it.
        ngram: Length of the word sequences whose repetition is counted (InternVL2.5: 10).
        max_repetition: Largest share of repeated ones (InternVL2.5: 0.4).
        min_words: Fewest words of the thinking.
        max_words: Most words of the thinking.
        max_answer_words: Most words of the answer, which is to be concise.
        max_foreign: Largest share of letters in a script that neither the question nor the
            reference uses. Latin and Greek letters are at home everywhere.
    """

    boxed: bool = False
    opening_optional: bool = False
    ngram: int = 10
    max_repetition: float = 0.4
    min_words: int = 3
    max_words: int = 8192
    max_answer_words: int = 256
    max_foreign: float = 0.05


@dataclass(frozen=True, slots=True)
class Solution:
    """A worked solution taken apart.

    Attributes:
        thinking: What stands between the tags.
        answer: What follows.
    """

    thinking: str
    answer: str


def take_apart(text: str, rules: Rules | None = None) -> Solution | Fault:
    """The two parts of a well-formed solution, or what is wrong with its form.

    Well-formed is exactly one closed ``<think>...</think>`` at the beginning with something in it
    and an answer after it.

    Args:
        text: A whole response.
        rules: Their ``opening_optional`` and ``boxed`` count; the defaults if None.
    """
    rules = rules or Rules()
    text = text.strip()
    if not text:
        return "no_reply"
    if rules.opening_optional and _CLOSE in text and _OPEN not in text:
        text = _OPEN + text
    if fault := _tag_fault(text):
        return fault
    thinking, _, answer = text.removeprefix(_OPEN).partition(_CLOSE)
    if not thinking.strip():
        return "empty_thinking"
    if not answer.strip():
        return "no_answer"
    if rules.boxed and last_boxed(answer) is None:
        return "no_box"
    return Solution(thinking.strip(), answer.strip())


def _tag_fault(text: str) -> Fault | None:
    """What is wrong with the tags of a text that does not begin or end with blanks."""
    opened, closed = text.count(_OPEN), text.count(_CLOSE)
    if not opened and not closed:
        return "no_thinking"
    if max(opened, closed) > 1:
        return "several_blocks"
    if not opened:
        return "unopened_thinking"
    if _CLOSE not in text.partition(_OPEN)[2]:
        return "unclosed_thinking"
    return None if text.startswith(_OPEN) else "text_before"


def repetition(text: str, ngram: int = 10) -> float:
    """Share of word sequences that occur more than once, in 0 to 1.

    All occurrences of sequences that occur at least twice, divided by all sequences. A text
    with fewer words than one sequence has none that repeat.

    Args:
        text: Any text.
        ngram: Words in a sequence.
    """
    words = words_of(text)
    counts = Counter(tuple(words[at : at + ngram]) for at in range(len(words) - ngram + 1))
    repeated = sum(count for count in counts.values() if count > 1)
    return repeated / counts.total() if counts else 0.0


def fault_of(
    text: str,
    *,
    question: str,
    check: Callable[[str], bool],
    rules: Rules | None = None,
    finished: bool = True,
) -> Fault | None:
    """The first reason not to use a solution; None if it is good.

    Args:
        text: The whole response.
        question: What was asked, with the reference answer if that is longer than a word: its
            scripts are those the thinking may use.
        check: Whether a text gives the right final answer.
        rules: Limits; the defaults if None.
        finished: False where the responder was stopped at its limit of tokens.
    """
    rules = rules or Rules()
    parts = take_apart(text, rules)
    if not isinstance(parts, Solution):
        return parts
    if not check(parts.answer):
        return "wrong_answer"
    if repetition(text, rules.ngram) > rules.max_repetition:
        return "repetitive"
    if not finished:
        return "cut_off"
    num_words = len(words_of(parts.thinking))
    if num_words < rules.min_words:
        return "too_short"
    if num_words > rules.max_words:
        return "too_long"
    if len(words_of(parts.answer)) > rules.max_answer_words:
        return "long_answer"
    return clarity_fault(
        parts.thinking,
        parts.answer,
        question=question,
        check=check,
        max_foreign=rules.max_foreign,
    )


def distinct(texts: Sequence[str]) -> list[int]:
    """Places of the texts that differ in their words from all before them."""
    seen: set[tuple[str, ...]] = set()
    places = []
    for place, text in enumerate(texts):
        words = tuple(word.casefold() for word in words_of(text))
        if words not in seen:
            places.append(place)
            seen.add(words)
    return places


def choose(texts: Sequence[str], count: int, how: Choice = "shortest") -> list[int]:
    """Places of the solutions to keep, the best first.

    ``shortest`` takes those with the fewest words. ``diverse`` takes the shortest first and then,
    one by one, the one least like those already taken: the largest Jaccard similarity of their
    word triples counts. Ties go to the shorter, then to the earlier.

    Args:
        texts: Solutions, no two alike.
        count: How many to keep at most.
        how: By which rule.
    """
    words = [words_of(text) for text in texts]
    left = sorted(range(len(texts)), key=lambda place: (len(words[place]), place))
    if how == "shortest":
        return left[:count]
    triples = [{tuple(each[at : at + 3]) for at in range(max(1, len(each) - 2))} for each in words]
    taken: list[int] = []
    while left and len(taken) < count:
        nearest = [
            max((_jaccard(triples[place], triples[other]) for other in taken), default=0.0)
            for place in left
        ]
        taken.append(left.pop(nearest.index(min(nearest))))
    return taken


def _jaccard(left: set[tuple[str, ...]], right: set[tuple[str, ...]]) -> float:
    return len(left & right) / len(left | right)


JUDGE_PROMPT = (
    "Rate the worked solution to the question from 0 to 10. 10 means that every step follows from "
    "the question, the picture or an earlier step, that nothing is repeated or left open, and that "
    "a reader can check it line by line; 0 means that it cannot be followed. The final answer is "
    "known to be right: rate the way to it.\n\nQuestion:\n{question}\n\nWorked solution:\n"
    "{solution}\n\nEnd with one line: Score: <number from 0 to 10>"
)
"""How a judge is asked; ours, after InternVL2.5's scores of 0 to 10 (its wording is not public)."""

JUDGE_THRESHOLD = 7.0
"""Solutions with a lower score are not used (InternVL2.5)."""

_SCORE = re.compile(r"score\W{0,5}([0-9]{1,2}(?:\.[0-9]{1,3})?)(?![0-9])", re.IGNORECASE)
_BARE_SCORE = re.compile(r"\s*([0-9]{1,2}(?:\.[0-9]{1,3})?)(?:\s*/\s*10)?\.?\s*")


def judge_question(question: str, solution: str) -> str:
    """What a judge is asked about a solution.

    Args:
        question: The question.
        solution: The whole response.
    """
    return JUDGE_PROMPT.format(question=question, solution=solution)


def judge_score(reply: str) -> float | None:
    """The score a judge gave: after the last "Score", or all it said; None if there is none.

    Args:
        reply: The judge's reply, thinking included.
    """
    said = reply.rpartition(_CLOSE)[2]
    found = _SCORE.findall(said)
    bare = _BARE_SCORE.fullmatch(said)
    score = float(found[-1]) if found else float(bare[1]) if bare else -1.0
    return score if 0.0 <= score <= 10.0 else None
