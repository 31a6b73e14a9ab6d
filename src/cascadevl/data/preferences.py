"""Preference pairs of sampled answers: which answer is better, as far as a reference can tell.

The correctness pipeline of MMPR (arXiv 2411.10442, section 3): of the answers drawn for a question,
one with the right final answer is preferred to one with a wrong one or none. What the paper leaves
open is in docs/decisions/0021. Where there is no reference, DropoutNTP makes the worse answer
(`cascadevl.workflows.preference_data`); what that needs of texts is here, too.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Literal, TypeAlias

import numpy as np

from cascadevl.errors import ConfigError
from cascadevl.scoring.answers import final_answer, normalise
from cascadevl.scoring.clarity import word_ends
from cascadevl.types import ImageRef, Message, Part, Rollout, SampledAnswer

MAX_PAIRS = 15
"""Most pairs of a question (MMPR)."""

MAX_PAIRS_OF_MANY, MANY = 3, 500_000
"""Most pairs of a question where there are more questions than this (public code of MMPR)."""

Outcome: TypeAlias = Literal["paired", "open", "none_correct", "all_correct", "entailed"]
"""What became of a question: it has pairs; it has no reference; no answer is right, or none is
wrong; or every wrong answer contains the right one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRules:
    """Which pairs are made of a question's answers.

    Attributes:
        max_pairs: Most pairs of a question.
        skip_entailed: Whether to leave out a pair whose rejected final answer contains the chosen
            one: it may be right, said in more words.
        seed: Of the order in which answers are taken.
    """

    max_pairs: int = MAX_PAIRS
    skip_entailed: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work.

        Raises:
            ConfigError: If no pair is wanted, or the seed is negative.
        """
        for name, least in (("max_pairs", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The pairs of one question.

    Attributes:
        outcome: What became of the question.
        pairs: Chosen and rejected answer of each.
        num_entailed: Pairs that were left out because the rejected answer contains the chosen one.
    """

    outcome: Outcome
    pairs: tuple[tuple[SampledAnswer, SampledAnswer], ...] = ()
    num_entailed: int = 0


def pairs_of(rollout: Rollout, rules: PairRules) -> Pairs:
    """Pairs of a right and a wrong answer to one question.

    Answers that say the same count once. A right answer that was cut off is never chosen, and an
    empty one never rejected: neither can be learned from. Every answer is used as often as any
    other of its kind, give or take one, as far as pairs left out allow. Which pairs these are
    depends on the seed and the question alone.

    Args:
        rollout: The question and its answers.
        rules: How many pairs, and which are left out.
    """
    if not rollout.metric:
        return Pairs(outcome="open")
    seed = [rules.seed, zlib.crc32(rollout.problem_id.encode())]
    generator = np.random.default_rng(seed)
    chosen = _shuffled(_different(filter(_is_good, rollout.answers)), generator)
    rejected = _shuffled(_different(filter(_is_bad, rollout.answers)), generator)
    if not chosen or not rejected:
        return Pairs(outcome="all_correct" if chosen else "none_correct")
    pairs: list[tuple[SampledAnswer, SampledAnswer]] = []
    num_entailed = 0
    for left, right in balanced(len(chosen), len(rejected)):
        if len(pairs) == rules.max_pairs:
            break
        if rules.skip_entailed and is_entailed(chosen[left], rejected[right]):
            num_entailed += 1
        else:
            pairs.append((chosen[left], rejected[right]))
    outcome: Outcome = "paired" if pairs else "entailed"
    return Pairs(outcome=outcome, pairs=tuple(pairs), num_entailed=num_entailed)


def balanced(num_left: int, num_right: int) -> Iterator[tuple[int, int]]:
    """All pairs of two kinds of things, so that of any first few each thing is in equally many.

    Args:
        num_left: Things of the first kind; at least one.
        num_right: Things of the second kind; at least one.

    Yields:
        Numbers of both; how often two of a kind have come never differs by more than one.
    """
    period = lcm(num_left, num_right)
    for number in range(num_left * num_right):
        yield number % num_left, (number + number // period) % num_right


def is_entailed(chosen: SampledAnswer, rejected: SampledAnswer) -> bool:
    """Whether the rejected final answer contains the chosen one, as whole words and numbers.

    An answer that was cut off has no final answer.

    Args:
        chosen: An answer that counts as right.
        rejected: One that counts as wrong.
    """
    if rejected.finish_reason == "length":
        return False
    right, wrong = (normalise(final_answer(each.text)) for each in (chosen, rejected))
    # 5 is in "5 apples", but not in 15, 5.2, 5/2 or -5
    inside = rf"(?<![\w.,/-]){re.escape(right)}(?!\w|[.,/]\w)"
    return bool(right) and re.search(inside, wrong) is not None


def _is_good(answer: SampledAnswer) -> bool:
    return answer.correct and answer.finish_reason == "stop" and bool(answer.text.strip())


def _is_bad(answer: SampledAnswer) -> bool:
    return not answer.correct and bool(answer.text.strip())


def _different(answers: Iterator[SampledAnswer]) -> list[SampledAnswer]:
    """The first of all that say the same."""
    found: dict[str, SampledAnswer] = {}
    for answer in answers:
        found.setdefault(answer.text.strip(), answer)
    return list(found.values())


def _shuffled(
    answers: Sequence[SampledAnswer], generator: np.random.Generator
) -> list[SampledAnswer]:
    return [answers[place] for place in generator.permutation(len(answers))]


def preferred(rollout: Rollout, number: int) -> list[SampledAnswer]:
    """Answers of a question that DropoutNTP may take for good: the first that say different things.

    Args:
        rollout: The question and its answers; without a reference any finished one is taken.
        number: Most answers.
    """
    answers = rollout.answers
    good = (
        answer
        for answer in answers
        if answer.finish_reason == "stop"
        and answer.text.strip()
        and (answer.correct or not rollout.metric)
    )
    return _different(good)[:number]


def first_part(text: str, share: float) -> str:
    """The beginning of a text: that share of its words, as `words_of` counts them.

    Args:
        text: The text.
        share: From 0 to 1.

    Returns:
        Empty if there are too few words to cut.
    """
    ends = word_ends(text)
    number = int(len(ends) * share)
    return text[: ends[number - 1]] if 0 < number < len(ends) else ""


def without_pictures(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The same conversation in words alone; the line break after a picture goes with it.

    Args:
        messages: The turns.
    """
    return tuple(replace(turn, parts=_words(turn.parts)) for turn in messages)


def _words(parts: Sequence[Part]) -> tuple[Part, ...]:
    kept: list[Part] = []
    was_picture = False
    for part in parts:
        if isinstance(part, str):
            kept.append(part.removeprefix("\n") if was_picture else part)
        was_picture = not isinstance(part, str)
    return tuple(part for part in kept if part)


def shows_a_picture(messages: Sequence[Message]) -> bool:
    """Whether any turn shows one.

    Args:
        messages: The turns.
    """
    return any(isinstance(part, ImageRef) for turn in messages for part in turn.parts)
