"""The released choice of a grid, written as the sentence reads: one loop, no cache, no search."""

from __future__ import annotations


def grid(width: int, height: int, tile_px: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    candidates = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles + 1)
        if min_tiles <= columns * rows <= max_tiles
    ]
    best, smallest = (1, 1), float("inf")
    for columns, rows in sorted(candidates, key=lambda pair: pair[0] * pair[1]):
        distance = abs(width / height - columns / rows)
        large_enough = width * height > 0.5 * tile_px * tile_px * columns * rows
        if distance < smallest or (distance == smallest and large_enough):
            best, smallest = (columns, rows), distance
    return best
