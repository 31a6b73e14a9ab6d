"""Choosing among several answers without a judge: votes, and when a choice is settled.

Self-consistency (arXiv 2203.11171) takes the final answer that most of the samples agree on.
Drawing may stop as soon as the leader cannot be overtaken by those that are still to come: the
choice is then that of all of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from cascadevl.scoring.answers import final_answer, normalise, parse_number

_CHOICE = re.compile(r"[(\[]?([A-Z])(?:[)\].:](?=\s|$)|\s*$)")


def ballot(text: str) -> str | None:
    """What an answer votes for: its final answer in a common form; None if it has none.

    Numbers are equal by value ("12.0" and "12"), choices by their letter ("(B)" and "B. red"),
    everything else by its words.

    Args:
        text: The whole answer.
    """
    answer = final_answer(text)
    if not answer:
        return None
    number = parse_number(answer)
    if number is not None:
        return f"{number:.10g}"
    if letter := _CHOICE.match(answer):
        return letter[1].casefold()
    return normalise(answer) or None


def tally(ballots: Sequence[str | None]) -> list[tuple[str, int]]:
    """Every candidate with its votes, the leader first; of equals the one named first leads.

    Args:
        ballots: In the order they came; None is no vote.
    """
    return Counter(each for each in ballots if each is not None).most_common()


def is_decided(ballots: Sequence[str | None], num_left: int) -> bool:
    """Whether the leader stays it, whatever the votes that are still to come say.

    Args:
        ballots: The votes so far.
        num_left: Votes to come.
    """
    standing = tally(ballots)
    if num_left == 0:
        return True
    if not standing:
        return False
    leader, most = standing[0]
    if num_left > most:  # somebody who was not named yet
        return False
    order = list(dict.fromkeys(each for each in ballots if each is not None))
    return all(
        votes + num_left < most
        or (votes + num_left == most and order.index(leader) < order.index(other))
        for other, votes in standing[1:]
    )


def calibrated_score(
    scores: Sequence[float], right: Sequence[bool], *, precision: float
) -> float | None:
    """The lowest score from which on answers are right often enough.

    Drawing may stop at an answer of that score. To be chosen on questions that nothing is measured
    on afterwards.

    Args:
        scores: Of answers to questions whose references are known.
        right: Whether each is right.
        precision: Share of the answers with that score or more that must be right.

    Returns:
        The score; None if no score reaches the share.
    """
    ordered = sorted(zip(scores, right, strict=True), reverse=True)
    lowest, num_right = None, 0
    for number, (score, is_right) in enumerate(ordered, start=1):
        num_right += is_right
        is_last_of_its_score = number == len(ordered) or ordered[number][0] < score
        if is_last_of_its_score and num_right >= precision * number:
            lowest = score
    return lowest
