"""Signs that a worked solution is hard to follow, found without a model.

Each is a rule that a person can check by eye. They err on the side of keeping: a rule fires only
where the text itself shows the fault.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, TypeAlias

from cascadevl.scoring.answers import last_boxed, normalise

ClarityFault: TypeAlias = Literal[
    "cut_off", "garbled", "mixed_languages", "other_answer", "refers_to_thinking"
]

_EAST_ASIAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_EAST_ASIAN}]|[^\W_{_EAST_ASIAN}]+|([^\w\s]|_)\1*")

_OPEN_END = re.compile(r"(?:[,;:({\[=+]|\b(?:and|or|the|an|of|so|because|since|therefore))\Z")
# Control tokens of any family, and UTF-8 that was read as Latin-1.
_DEBRIS = re.compile(r"<\|[\w-]{1,30}\|>|</?img>|<IMG_CONTEXT>|\u00c3[\u0080-\u00bf]|\u00e2\u20ac")
_RUN = re.compile(r"([^\s=_.*#-])\1{29}")
_STATED = re.compile(r"\b(?:final\s{1,3})?answer\s{0,3}(?:is|:)\s{0,3}:?([^\n]*)", re.IGNORECASE)
_NEGATED = re.compile(r"\W{0,3}not\b", re.IGNORECASE)
_BACKWARD = re.compile(
    r"\b(?:as|see|from|shown|derived|explained)\b[^.\n]{0,40}\b(?:above|earlier)\b"
    r"|\b(?:my|the|this)\s(?:above\s)?(?:thinking|thoughts?|thought\sprocess|reasoning)\b",
    re.IGNORECASE,
)
_AT_HOME = frozenset({"LATIN", "GREEK", "MATHEMATICAL", "MODIFIER", "SUPERSCRIPT", "SUBSCRIPT"})
_EAST = {"CJK": "CJK", "HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK"}


def words_of(text: str) -> list[str]:
    """Words, signs, and East Asian characters one by one: what lengths are counted in.

    A sign several times on end, such as a ruled line, is one.
    """
    return [match[0] for match in _WORD.finditer(text)]


def word_ends(text: str) -> list[int]:
    """Where each of `words_of` ends in the text."""
    return [match.end() for match in _WORD.finditer(text)]


def clarity_fault(
    thinking: str,
    answer: str,
    *,
    question: str,
    check: Callable[[str], bool],
    max_foreign: float,
) -> ClarityFault | None:
    """The first sign that a solution is unclear, or None.

    Args:
        thinking: What stands between the thinking tags.
        answer: What follows; right, as ``check`` says.
        question: Its scripts are those that may be used.
        check: Whether a text gives the right final answer.
        max_foreign: Largest share of letters in other scripts.
    """
    if is_cut_off(thinking) or is_cut_off(answer):
        return "cut_off"
    if is_garbled(thinking) or is_garbled(answer):
        return "garbled"
    if foreign_share(thinking + answer, question) > max_foreign:
        return "mixed_languages"
    if states_another(thinking, answer, check):
        return "other_answer"
    if _BACKWARD.search(answer):
        return "refers_to_thinking"
    return None


def is_cut_off(text: str) -> bool:
    r"""Whether a text breaks off: within a clause, a bracket of ``\boxed``, or a code block."""
    text = text.rstrip()
    opened = text.rfind("\\boxed{")
    if opened >= 0 and last_boxed(text[opened:]) is None:
        return True
    return text.count("```") % 2 == 1 or _OPEN_END.search(text) is not None


def is_garbled(text: str) -> bool:
    """Whether a text holds debris: broken encoding, control tokens, one sign 30 times on end."""
    if _DEBRIS.search(text) or _RUN.search(text):
        return True
    return any(
        character == "\ufffd"
        or (unicodedata.category(character) in ("Cc", "Co", "Cs") and character not in "\n\r\t")
        for character in text
    )


def foreign_share(text: str, question: str) -> float:
    """Share of a text's letters in scripts that the question does not use.

    Latin and Greek are at home everywhere, for names and formulas; so an English solution of a
    Chinese question passes, a Chinese one of an English question does not. Without any letter in
    the question nothing is foreign.

    Args:
        text: The text.
        question: What it is about.
    """
    known = set(_scripts(question))
    scripts = _scripts(text)
    if not known or not scripts:
        return 0.0
    return sum(script not in known | _AT_HOME for script in scripts) / len(scripts)


def _scripts(text: str) -> list[str]:
    return [_script(character) for character in text if character.isalpha()]


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    name = unicodedata.name(letter, "UNKNOWN").split(maxsplit=1)[0]
    return _EAST.get(name, name)


def states_another(thinking: str, answer: str, check: Callable[[str], bool]) -> bool:
    r"""Whether the thinking ends on another final answer than the one given.

    Only what it calls so counts: its last ``\boxed{...}`` and the rest of the line after its last
    "answer is" or "answer:". A statement agrees if it is right too, names the answer given, or
    says what the answer is not.

    Args:
        thinking: What stands between the thinking tags.
        answer: The answer given, which is right.
        check: Whether a text gives the right final answer.
    """
    stated = [box] if (box := last_boxed(thinking)) is not None else []
    if marked := [said for text in _STATED.findall(thinking) if (said := text.strip())]:
        stated.append(marked[-1])
    given = last_boxed(answer)
    wanted = normalise(answer if given is None else given)
    return any(
        not check(text) and not _NEGATED.match(text) and not _names(normalise(text), wanted)
        for text in stated
    )


def _names(text: str, wanted: str) -> bool:
    return bool(wanted) and bool(re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text))
