"""From one slot an image to one token a visual token: expansion and positions.

Training and inference share this one pure function. It stands below both the data path and
the model because both call it (docs/decisions/0001). Positions follow V2PE: InternVL3 report,
section 2.1, eqs. 1-4. A text token moves the position forward by 1, a visual token by its
image's increment. Positions are float32: every increment is a power of two, so the running
sum is exact up to 2**16, while bfloat16 already merges neighbours above 2**8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from jaxtyping import Bool, Float, Int, Int64

from cascadevl.errors import DataError
from cascadevl.types import NO_PARENT, Example

INCREMENTS = tuple(2.0**-power for power in range(9))
"""The increments training draws from: 1, 1/2, ..., 1/256 (InternVL3 report, eq. 4)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Expanded:
    """A sample with its image slots expanded; all arrays have one entry a token.

    Attributes:
        input_ids: Token ids.
        position_ids: Positions (V2PE), starting at 0; float32.
        trained: Whether the token is a prediction target; never true of a visual token.
        segments: Segment of each token.
        parents: Parent of each token's segment.
        is_visual: Whether the token is a visual token.
    """

    input_ids: Int64[np.ndarray, " tokens"]
    position_ids: Float[np.ndarray, " tokens"]
    trained: Bool[np.ndarray, " tokens"]
    segments: Int64[np.ndarray, " tokens"]
    parents: Int64[np.ndarray, " tokens"]
    is_visual: Bool[np.ndarray, " tokens"]


def position_ids(
    steps: Float[np.ndarray, " tokens"],
    segments: Int[np.ndarray, " tokens"],
    parents: Sequence[int],
    *,
    image_ends: Sequence[int] = (),
) -> Float[np.ndarray, " tokens"]:
    """Positions from the step of every token (InternVL3 report, eqs. 1-2).

    Args:
        steps: How far each token moves the position: 1 for text, the increment for visual tokens.
        segments: Segment of each token, contiguous, from 0 upwards.
        parents: Segment that each segment continues, an earlier one, or ``NO_PARENT``.
        image_ends: Index of the last visual token of every image, ascending, if the position is
            to be rounded up to a whole number after each image, as weights trained with the
            public V2PE code expect (docs/decisions/0003); empty for the formula as printed.

    Returns:
        Float32 positions; the first token of a segment without a parent sits at 0.
    """
    starts = np.searchsorted(segments, np.arange(len(parents) + 1))
    stops, first = starts[1:].tolist(), starts[:-1].tolist()
    walk = steps.astype(np.float64)
    walk[[a for a, b, p in zip(first, stops, parents, strict=True) if p == NO_PARENT and a < b]] = 0
    np.cumsum(walk, out=walk)  # as if all segments stood one behind the other
    after = walk
    if len(image_ends) > 0:
        rounding = np.zeros(len(walk))
        rounding[list(image_ends)] = _rounding(walk[list(image_ends)])
        after = walk + np.cumsum(rounding)
        walk = after - rounding  # an image's last token stands before the rounding it causes
    shifts: list[float] = []  # of each segment, from the one long walk to its place
    ends: list[float] = []  # position from which a segment's continuation goes on
    for start, stop, parent in zip(first, stops, parents, strict=True):
        before = float(after[start - 1]) if start > 0 else 0.0
        origin = 0.0 if parent == NO_PARENT else ends[parent]
        shifts.append(origin - before)
        ends.append(origin - before + float(after[stop - 1]) if stop > start else origin)
    walk += np.repeat(shifts, np.diff(starts))
    return walk.astype(np.float32)


def tokens_per_image(
    tiles_per_image: Sequence[int], tokens_per_tile: int | Sequence[int]
) -> tuple[int, ...]:
    """Visual tokens of each image.

    Args:
        tiles_per_image: Tiles of each image.
        tokens_per_tile: Visual tokens of every tile, or one number for each.

    Raises:
        DataError: If there are not as many numbers as tiles.
    """
    if isinstance(tokens_per_tile, int):
        return tuple(number * tokens_per_tile for number in tiles_per_image)
    if len(tokens_per_tile) != sum(tiles_per_image):
        raise DataError(
            f"{len(tokens_per_tile)} numbers of visual tokens for {sum(tiles_per_image)} tiles; "
            f"each tile needs one",
            kind="image_count",
        )
    tokens = iter(tokens_per_tile)
    return tuple(sum(islice(tokens, number)) for number in tiles_per_image)


def num_positions(example: Example, *, image_token_id: int, tokens_per_tile: int) -> int:
    """Positions that an example takes at most: those of its longest branch.

    Each image counts as rounded up to a whole number of positions, whether or not it will be.

    Args:
        example: The example; where its increments are open, the smallest counts.
        image_token_id: The image-context token.
        tokens_per_tile: Visual tokens of every tile for which the example does not say.
    """
    counts = example.tokens_per_tile or tokens_per_tile
    tokens = np.asarray(tokens_per_image(example.tiles_per_image, counts), dtype=np.int64)
    increments = example.increments or (INCREMENTS[-1],) * len(tokens)
    steps = np.ones(len(example.input_ids))
    steps[example.input_ids == image_token_id] = np.ceil(np.round(tokens * increments, 6))
    return int(position_ids(steps, example.segments, example.parents).max(initial=-1)) + 1


def _rounding(at_ends: Float[np.ndarray, " images"]) -> Float[np.ndarray, " images"]:
    """How far the position moves up after each image, given the unrounded walk at their ends.

    Text moves by whole numbers and every earlier image was rounded, so the fraction at an
    image's end is that of the stretch since the image before it.
    """
    stretch = np.diff(at_ends, prepend=0.0)
    # an increment that is no power of two sums to a hair beside the whole number it means
    return np.ceil(np.round(stretch, 6)) - stretch


def expand(
    input_ids: Int[np.ndarray, " slots"],
    trained: Bool[np.ndarray, " slots"],
    segments: Int[np.ndarray, " slots"],
    parents: Sequence[int],
    *,
    image_token_id: int,
    tokens_per_image: Sequence[int],
    increments: Sequence[float],
    ceil_after_image: bool = False,
    source: str = "sample",
) -> Expanded:
    """Repeat every image slot as often as its image has visual tokens, and place all tokens.

    Args:
        input_ids: Token ids with exactly one ``image_token_id`` for each image.
        trained: Whether each token is a prediction target.
        segments: Segment of each token, contiguous, from 0 upwards.
        parents: Segment that each segment continues, or ``NO_PARENT``.
        image_token_id: The image-context token.
        tokens_per_image: Visual tokens of each image, all its tiles together.
        increments: Position step of each image's visual tokens.
        ceil_after_image: Round the position up after an image (docs/decisions/0003).
        source: Named in errors.

    Raises:
        DataError: If slots, token counts and increments do not agree in number.
    """
    is_slot = input_ids == image_token_id
    num_slots = int(is_slot.sum())
    if not num_slots == len(tokens_per_image) == len(increments):
        raise DataError(
            f"{num_slots} image slots in the text, visual tokens of {len(tokens_per_image)} images "
            f"and {len(increments)} increments; each image needs exactly one of each",
            kind="image_count",
            source=source,
        )
    repeats = np.ones(len(input_ids), dtype=np.int64)
    repeats[is_slot] = tokens_per_image
    steps = np.ones(len(input_ids), dtype=np.float64)
    steps[is_slot] = increments
    expanded_segments = np.repeat(segments, repeats).astype(np.int64)
    ends = np.cumsum(repeats)[is_slot] - 1 if ceil_after_image else np.empty(0, dtype=np.int64)
    return Expanded(
        input_ids=np.repeat(input_ids, repeats).astype(np.int64),
        position_ids=position_ids(
            np.repeat(steps, repeats), expanded_segments, parents, image_ends=ends.tolist()
        ),
        trained=np.repeat(trained & ~is_slot, repeats),
        segments=expanded_segments,
        parents=np.asarray(parents, dtype=np.int64)[expanded_segments],
        is_visual=np.repeat(is_slot, repeats),
    )
