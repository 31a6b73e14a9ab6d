"""Which steps of a chain (`cascadevl.tasks.chains`) are right, and errors that are planted in them.

Whoever reads a finished step has all digits before them, so a step is easier to judge than to
write, which is what a process reward needs; and slips of a carry are made alike in many answers,
which is what a vote suffers from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

ERRORS = (-10, -2, -1, 1, 2, 10)
"""By how much a planted total is wrong: a slip of one, or of a carry."""

_TOTAL = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")


def truth_of(steps: Sequence[str], reference: Sequence[str]) -> list[bool]:
    """Which steps are right so far: those up to which all is as in the worked solution.

    There is one way to write a running total, so other words are other numbers.

    Args:
        steps: Of an answer.
        reference: Of the worked solution.
    """
    return [list(steps[: n + 1]) == list(reference[: n + 1]) for n in range(len(steps))]


def plant(steps: Sequence[str], rng: np.random.Generator) -> tuple[list[str], list[bool]]:
    """A worked solution with one wrong total, from which everything behind it is calculated.

    Args:
        steps: The solution; its last step is the answer alone.
        rng: Chooses the step, and by how much it is wrong.

    Returns:
        The steps, and which of them are still right.
    """
    places = [number for number, step in enumerate(steps) if _TOTAL.search(step)]
    while True:
        place, by = int(rng.choice(places)), int(rng.choice(ERRORS))
        planted = with_error(steps, place, by)
        if planted is not None:
            return planted, [number < place for number in range(len(steps))]


def with_error(steps: Sequence[str], place: int, by: int) -> list[str] | None:
    """The steps with one total wrong by so much; None if one would fall below zero.

    Args:
        steps: A worked solution; its last step is the answer alone.
        place: The step that is wrong.
        by: How much too large its total is.
    """
    planted, total = list(steps[:place]), -1
    for number, step in enumerate(steps[place:-1], start=place):
        match = _TOTAL.search(step)
        assert match is not None, "behind the first total there are totals only"
        left, right = int(match[1]) if number == place else total, int(match[3])
        total = left + right if match[2] == "+" else left - right
        total += by if number == place else 0
        if total < 0:
            return None
        written = f"{left} {match[2]} {right} = {total}"
        planted.append(f"{step[: match.start()]}{written}{step[match.end() :]}")
    return [*planted, str(total)]
