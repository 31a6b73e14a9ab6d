"""Which steps of a search for numbers (`cascadevl.tasks.subset_sum`) are right, and planted errors.

An error is a number that does not belong to the sum: from the step in which it is taken, the way
leads to no right answer, whatever is added later.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from cascadevl.tasks.chains import totals

_TOTAL = re.compile(r"(\d+) \+ (\d+) = \d+")
_LIST = re.compile(r"\d+(?:, \d+)+")


def truth_of(steps: Sequence[str], reference: Sequence[str]) -> list[bool]:
    """Which steps are right so far: those up to which all is as in the worked solution.

    Numbers are taken in the order of their list, so other words are other numbers.

    Args:
        steps: Of an answer.
        reference: Of the worked solution.
    """
    return [list(steps[: n + 1]) == list(reference[: n + 1]) for n in range(len(steps))]


def plant(
    prompt: str, steps: Sequence[str], rng: np.random.Generator
) -> tuple[list[str], list[bool]]:
    """A worked solution with one wrong number in it, and all totals calculated from it.

    Args:
        prompt: The question, with what is to choose from unless the first step reads it.
        steps: The solution; its last step is the answer alone.
        rng: Chooses the number, and what stands in its place.

    Returns:
        The steps, and which of them are still right.
    """
    found = [place for place, step in enumerate(steps) if _TOTAL.search(step)]
    chosen = [int(number) for number in steps[-1].split(", ")]
    place = int(rng.integers(len(chosen)))
    listed = _LIST.search(f"{prompt}\n{steps[0]}")
    assert listed is not None, "the numbers stand in the question, or are read first"
    others = [number for number in map(int, listed[0].split(", ")) if number not in chosen]
    chosen[place] = int(rng.choice(others))
    planted = list(steps)
    for where, total in zip(found, totals(chosen), strict=True):
        planted[where] = _TOTAL.sub(total, steps[where])
    planted[-1] = ", ".join(map(str, chosen))
    first_wrong = found[max(place - 1, 0)]
    return planted, [number < first_wrong for number in range(len(steps))]
