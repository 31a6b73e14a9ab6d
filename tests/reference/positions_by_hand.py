"""V2PE positions token by token, exact fractions and loops: InternVL3 report, eqs. 1-4."""

from __future__ import annotations

import math
from fractions import Fraction


def positions(
    tokens: list[tuple[str, Fraction, int]], parents: list[int], *, ceil_after_image: bool = False
) -> list[Fraction]:
    """Position of each token.

    Args:
        tokens: ``(kind, step, segment)`` with kind ``"text"``, ``"visual"`` or ``"visual_end"``,
            the latter for the last visual token of an image.
        parents: Segment that each segment continues, or -1.
        ceil_after_image: As the public V2PE code: after an image, ``last = ceil(last)``.
    """
    last: dict[int, Fraction] = {}
    found = []
    for kind, step, segment in tokens:
        if segment in last:
            position = last[segment] + step
        elif parents[segment] >= 0:
            position = last[parents[segment]] + step
        else:
            position = Fraction(0)
        found.append(position)
        rounded = ceil_after_image and kind == "visual_end"
        last[segment] = Fraction(math.ceil(position)) if rounded else position
    return found
