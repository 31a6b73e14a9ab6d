"""Pixel shuffle with loops: each square of patches becomes one token.

Shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Sequence


def shuffle(grid: Sequence, factor: int, version: str) -> list[list[list[float]]]:
    """One tile [rows][columns][channels] to [rows / factor][columns / factor][factor^2 channels].

    The channels of a token are those of its patches in reading order. Version ``v1`` swaps the
    token's row and column.
    """
    rows, columns = len(grid) // factor, len(grid[0]) // factor
    tokens: list[list[list[float]]] = []
    for first in range(rows if version == "v2" else columns):
        line = []
        for second in range(columns if version == "v2" else rows):
            row, column = (first, second) if version == "v2" else (second, first)
            channels: list[float] = []
            for i in range(factor):
                for j in range(factor):
                    channels += list(grid[row * factor + i][column * factor + j])
            line.append(channels)
        tokens.append(line)
    return tokens
