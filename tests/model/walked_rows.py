"""Positions of padded rows of a small model, one token after the other."""

from __future__ import annotations

import math

from tests.model.small import IMAGE

T, PAD = 3, 1


def walked(row: list[int], real: list[bool], increments: list[float], ceil: bool) -> list[float]:
    """Positions of one padded row, one token after the other, in Python floats."""
    positions, last, image = [], -1.0, -1
    for place, (token, is_real) in enumerate(zip(row, real, strict=True)):
        if not is_real:
            positions.append(0.0)
            continue
        before = [t for t, r in zip(row[:place], real[:place], strict=True) if r]
        if token == IMAGE and (not before or before[-1] != IMAGE):
            image += 1
        if token != IMAGE and before and before[-1] == IMAGE and ceil:
            last = float(math.ceil(last))
        last = last + (increments[image] if token == IMAGE else 1.0) if before else 0.0
        positions.append(last)
    return positions
