"""What a batch of packed rows must hold, token by token with lists and loops.

Written from the docstring of `cascadevl.types.Batch` and the reports, sharing no code with
`cascadevl.data.collate`: InternVL3 report, section 2.2 (weights), InternVL2.5 report (packing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from tests.reference import positions_by_hand


@dataclass
class Token:
    """One token of a row."""

    id: int
    position: float
    segment: int
    parent: int
    visual: bool
    trained: bool
    sample: int


@dataclass
class Lists:
    """A batch as nested lists."""

    rows: list[list[Token]] = field(default_factory=list)
    visual_index: list[int] = field(default_factory=list)
    targets: list[tuple[int, int, float, int]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


def _tokens(example: Any, image_id: int, per_tile: int, first: int, sample: int) -> list[Token]:
    kinds, made = [], []
    image = 0
    for id_, trained, segment in zip(
        example.input_ids.tolist(), example.trained.tolist(), example.segments.tolist(), strict=True
    ):
        visual = id_ == image_id
        count = example.tiles_per_image[image] * per_tile if visual else 1
        step = example.increments[image] if visual else 1
        image += visual
        parent = example.parents[segment]
        for number in range(count):
            end = visual and number == count - 1
            kinds.append(("visual_end" if end else "visual" if visual else "text", step, segment))
            made.append(
                Token(
                    id=id_,
                    position=0.0,
                    segment=first + segment,
                    parent=first + parent if parent >= 0 else -1,
                    visual=visual,
                    trained=trained and not visual,
                    sample=sample + segment,
                )
            )
    positions = positions_by_hand.positions(kinds, list(example.parents))
    for token, position in zip(made, positions, strict=True):
        token.position = float(position)
    return made


def batch(rows: list[list[Any]], *, image_id: int, per_tile: int, power: float) -> Lists:
    """Lay out the rows; ``power`` is 0, 1/2 or 1 for token, square and sample averaging."""
    result = Lists()
    for row in rows:
        tokens: list[Token] = []
        segments = 0
        for example in row:
            tokens += _tokens(example, image_id, per_tile, segments, len(result.sources))
            segments += len(example.parents)
            several = len(example.parents) > 1
            result.sources += [
                f"{example.source}#{number}" if several else example.source
                for number in range(len(example.parents))
            ]
        result.rows.append(tokens)
    width = max(len(row) for row in result.rows)
    found: list[tuple[int, int, int]] = []
    for number, row in enumerate(result.rows):
        for column, token in enumerate(row):
            if token.visual:
                result.visual_index.append(number * width + column)
            before = [c for c in range(column) if row[c].segment == token.segment]
            before = before or [c for c in range(column) if row[c].segment == token.parent]
            if token.trained and before:
                found.append((number * width + before[-1], token.id, token.sample))
    for index, id_, sample in found:
        length = sum(other == sample for _, _, other in found)
        result.targets.append((index, id_, 1 / math.pow(length, power), sample))
    return result
