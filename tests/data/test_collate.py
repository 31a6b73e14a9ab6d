"""Packed rows: what stands where, what is predicted from what, and with which weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import batch_by_hand

from cascadevl.data.collate import collate, num_tokens
from cascadevl.errors import DataError
from cascadevl.losses.next_token import Averaging
from cascadevl.sequence import INCREMENTS, num_positions, tokens_per_image
from cascadevl.types import NO_PARENT, Batch, Example

IMAGE, PAD, PER_TILE = 99, 0, 3


def example(
    *segments: list[tuple[int, bool]],
    parents: tuple[int, ...] = (NO_PARENT,),
    tiles: tuple[int, ...] = (),
    increments: tuple[float, ...] | None = None,
    source: str = "s",
    colour: int = 0,
) -> Example:
    """An example of (token id, trained) by segment; id 99 is an image slot."""
    flat = [token for segment in segments for token in segment]
    return Example(
        source=source,
        record_id=source,
        input_ids=np.array([id_ for id_, _ in flat], dtype=np.int64),
        trained=np.array([trained for _, trained in flat], dtype=bool),
        segments=np.repeat(np.arange(len(segments)), [len(segment) for segment in segments]),
        parents=parents,
        tiles=np.stack(
            [np.full((2, 2, 3), colour + number, dtype=np.uint8) for number in range(sum(tiles))]
        )
        if tiles
        else np.zeros((0, 2, 2, 3), dtype=np.uint8),
        tiles_per_image=tiles,
        increments=(1.0,) * len(tiles) if increments is None else increments,
    )


def text(*ids: int, trained_from: int = 1, source: str = "s") -> Example:
    return example([(id_, n >= trained_from) for n, id_ in enumerate(ids)], source=source)


def batch_of(
    *rows: list[Example], averaging: Averaging = "square", pad_to: int | None = None
) -> Batch:
    return collate(
        rows,
        image_token_id=IMAGE,
        pad_token_id=PAD,
        tokens_per_tile=PER_TILE,
        averaging=averaging,
        pad_to=pad_to,
    )


def test_two_rows_by_literal_tensors() -> None:
    picture = example(
        [(5, False), (IMAGE, True), (6, False), (7, True), (8, True)],
        tiles=(1,),
        increments=(0.5,),
        source="picture",
        colour=200,
    )
    batch = batch_of([picture, text(11, 12, source="a")], [text(21, 22, 23, source="b")])
    assert batch.input_ids.tolist() == [[5, 99, 99, 99, 6, 7, 8, 11, 12], [21, 22, 23] + [PAD] * 6]
    assert batch.position_ids.tolist() == [
        [0, 0.5, 1, 1.5, 2.5, 3.5, 4.5, 0, 1],
        [0, 1, 2] + [0] * 6,
    ]
    assert batch.segments.tolist() == [[0] * 7 + [1] * 2, [0] * 3 + [-1] * 6]
    assert batch.parents.tolist() == [[-1] * 9, [-1] * 9]
    assert batch.visual_index.tolist() == [1, 2, 3]
    assert batch.tokens_per_tile.tolist() == [PER_TILE]
    assert batch.target_index.tolist() == [4, 5, 7, 9, 10]
    assert batch.target_ids.tolist() == [7, 8, 12, 22, 23]
    assert batch.target_samples.tolist() == [0, 0, 1, 2, 2]
    assert batch.sources == ("picture", "a", "b")
    root = 2**-0.5
    torch.testing.assert_close(batch.target_weights, torch.tensor([root, root, 1.0, root, root]))
    assert batch.tiles is not None
    assert batch.tiles.tolist() == picture.tiles.tolist()
    assert batch.tiles.nbytes == picture.tiles.nbytes  # a byte a value
    assert batch.position_ids.dtype == batch.target_weights.dtype == torch.float32
    assert (batch.num_tokens, batch.num_tiles) == (12, 1)


@pytest.mark.parametrize(
    ("averaging", "weights"),
    [
        ("token", [1.0] * 5),
        ("square", [0.5] * 4 + [1.0]),
        ("sample", [0.25] * 4 + [1.0]),
    ],
)
def test_weights_by_the_number_of_targets_of_the_sample(
    averaging: Averaging, weights: list[float]
) -> None:
    # the sample of five tokens has four targets: its first token is predicted from nothing
    batch = batch_of([text(1, 2, 3, 4, 5, trained_from=0), text(6, 7)], averaging=averaging)
    assert batch.target_weights.tolist() == weights


def test_the_first_token_of_a_sample_is_never_predicted_from_the_sample_before() -> None:
    batch = batch_of([text(1, 2, trained_from=0), text(3, 4, trained_from=0)])
    assert list(zip(batch.target_index.tolist(), batch.target_ids.tolist(), strict=True)) == [
        (0, 2),
        (2, 4),
    ]


def test_a_branch_is_predicted_from_the_end_of_its_parent_and_is_its_own_sample() -> None:
    branching = example(
        [(1, False), (IMAGE, False), (2, True)],
        [(3, True), (4, True)],
        [(5, True)],
        [(6, False), (7, True)],
        parents=(NO_PARENT, 0, 0, 1),
        tiles=(1,),
        source="r",
    )
    batch = batch_of([text(8, 9), branching])
    assert batch.input_ids.tolist() == [[8, 9, 1, 99, 99, 99, 2, 3, 4, 5, 6, 7]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1, 1, 1, 2, 2, 3, 4, 4]]
    assert batch.parents.tolist() == [[-1] * 7 + [1, 1, 1, 2, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 4, 5, 6, 5, 7, 8]]
    assert batch.target_index.tolist() == [0, 5, 6, 7, 6, 10]
    assert batch.target_ids.tolist() == [9, 2, 3, 4, 5, 7]
    assert batch.target_samples.tolist() == [0, 1, 2, 2, 3, 4]
    assert batch.sources == ("s", "r#0", "r#1", "r#2", "r#3")
    root = 2**-0.5
    torch.testing.assert_close(batch.target_weights, torch.tensor([1.0, 1.0, root, root, 1.0, 1.0]))


def test_segments_and_parents_are_numbered_within_each_row() -> None:
    branching = example([(1, False)], [(2, True)], parents=(NO_PARENT, 0))
    batch = batch_of([branching, branching], [branching])
    assert batch.segments.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]]
    assert batch.parents.tolist() == [[-1, 0, -1, 2], [-1, 0, -1, -1]]


def test_ceil_after_image_reaches_every_sample_of_a_row() -> None:
    picture = example([(IMAGE, False), (1, True)], tiles=(1,), increments=(0.25,))
    batch = collate(
        [[picture, picture]],
        image_token_id=IMAGE,
        pad_token_id=PAD,
        tokens_per_tile=PER_TILE,
        averaging="square",
        ceil_after_image=True,
    )
    assert batch.position_ids.tolist() == [[0, 0.25, 0.5, 2, 0, 0.25, 0.5, 2]]
    assert batch_of([picture, picture]).position_ids.tolist() == [[0, 0.25, 0.5, 1.5] * 2]


def test_one_row_has_no_padding_and_text_no_pixels() -> None:
    batch = batch_of([text(1, 2, 3)])
    assert batch.input_ids.shape == (1, 3)
    assert batch.tiles is None
    assert batch.visual_index.tolist() == batch.tokens_per_tile.tolist() == []


def test_a_batch_without_targets_has_none() -> None:
    batch = batch_of([text(1, 2, trained_from=9)])
    assert batch.target_index.tolist() == batch.target_weights.tolist() == []


def test_rows_are_padded_to_a_fixed_width_on_request() -> None:
    batch = batch_of([text(1, 2)], [text(3, 4, 5)], pad_to=5)
    assert batch.input_ids.tolist() == [[1, 2, 0, 0, 0], [3, 4, 5, 0, 0]]
    assert batch.target_index.tolist() == [0, 5, 6]
    with pytest.raises(DataError, match="a row has 3 tokens, but rows are padded to 2") as caught:
        batch_of([text(1, 2)], [text(3, 4, 5, source="long")], pad_to=2)
    assert caught.value.source == "long"


@pytest.mark.parametrize(
    "broken",
    [
        example([(1, False), (IMAGE, False)], source="bad"),
        example([(1, False)], tiles=(1,), source="bad"),
        example([(IMAGE, False)], tiles=(2,), increments=(1.0, 1.0), source="bad"),
    ],
)
def test_an_example_whose_counts_differ_is_named(broken: Example) -> None:
    # the batch's totals could even agree; each example is counted alone
    with pytest.raises(DataError, match="bad: ") as caught:
        batch_of([text(1, 2, source="good"), broken])
    assert caught.value.kind == "image_count"


def test_two_errors_that_cancel_out_are_found() -> None:
    without_tile = example([(IMAGE, False)], source="bad")
    without_slot = example([(1, False)], tiles=(1,), source="worse")
    with pytest.raises(DataError, match="bad: 1 image slots in the text for 0 images"):
        batch_of([without_tile, without_slot])


slots = st.tuples(st.just(IMAGE), st.just(False), st.integers(1, 3), st.sampled_from(INCREMENTS))
words = st.tuples(st.integers(1, 50), st.booleans(), st.just(0), st.just(0.0))


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `example`; not the example, because beartype's checks draw random numbers."""
    segments = draw(
        st.lists(st.lists(st.one_of(words, slots), min_size=1, max_size=5), min_size=1, max_size=4)
    )
    images = [token for segment in segments for token in segment if token[0] == IMAGE]
    return {
        "segments": [[(id_, trained) for id_, trained, _, _ in segment] for segment in segments],
        "parents": tuple(draw(st.integers(NO_PARENT, n - 1)) for n in range(len(segments))),
        "tiles": tuple(token[2] for token in images),
        "increments": tuple(token[3] for token in images),
        "source": str(draw(st.integers(0, 999))),
    }


@given(
    st.lists(st.lists(arguments(), min_size=1, max_size=3), min_size=1, max_size=3),
    st.sampled_from([("token", 0.0), ("square", 0.5), ("sample", 1.0)]),
)
def test_any_batch_equals_the_one_by_hand(
    drawn: list[list[dict[str, Any]]], averaging: tuple[Averaging, float]
) -> None:
    rows = [[example(*d.pop("segments"), **d) for d in row] for row in drawn]
    batch = batch_of(*rows, averaging=averaging[0])
    wanted = batch_by_hand.batch(rows, image_id=IMAGE, per_tile=PER_TILE, power=averaging[1])
    for number, row in enumerate(wanted.rows):
        size = len(row)
        assert size == sum(num_tokens(e, PER_TILE) for e in rows[number])
        assert batch.input_ids[number, :size].tolist() == [token.id for token in row]
        assert batch.position_ids[number, :size].tolist() == [token.position for token in row]
        assert batch.segments[number, :size].tolist() == [token.segment for token in row]
        assert batch.parents[number, :size].tolist() == [token.parent for token in row]
        assert (batch.segments[number, size:] == -1).all()
    assert batch.visual_index.tolist() == wanted.visual_index
    assert len(batch.visual_index) == int(batch.tokens_per_tile.sum())
    found = zip(
        batch.target_index.tolist(),
        batch.target_ids.tolist(),
        batch.target_samples.tolist(),
        strict=True,
    )
    assert list(found) == [(index, id_, sample) for index, id_, _, sample in wanted.targets]
    weights = [weight for _, _, weight, _ in wanted.targets]
    torch.testing.assert_close(batch.target_weights, torch.tensor(weights, dtype=torch.float32))
    assert list(batch.sources) == wanted.sources


def test_tiles_stand_in_the_order_of_their_slots() -> None:
    first = example([(IMAGE, False), (1, True), (IMAGE, False)], tiles=(1, 2), colour=10)
    second = example([(IMAGE, False)], tiles=(1,), colour=50)
    batch = batch_of([first], [text(1, 2), second])
    assert batch.tiles is not None
    assert batch.tiles[:, 0, 0, 0].tolist() == [10, 11, 12, 50]
    # row 0: 3 visual, 1 text, 6 visual (10 wide); row 1: 2 text, 3 visual
    assert batch.visual_index.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 12, 13, 14]


def test_tiles_of_their_own_numbers_of_tokens_by_literal_tensors() -> None:
    mixed = replace(
        example(
            [(5, False), (IMAGE, True), (6, False), (IMAGE, True), (7, True)],
            tiles=(2, 1),
            increments=(0.5, 0.25),
        ),
        tokens_per_tile=(1, PER_TILE, 1),
    )
    batch = batch_of([mixed, example([(IMAGE, False), (8, True)], tiles=(1,))])
    assert batch.input_ids.tolist() == [[5, 99, 99, 99, 99, 6, 99, 7, 99, 99, 99, 8]]
    assert batch.position_ids.tolist() == [[0, 0.5, 1, 1.5, 2, 3, 3.25, 4.25, 0, 1, 2, 3]]
    assert batch.tokens_per_tile.tolist() == [1, PER_TILE, 1, PER_TILE]
    assert batch.visual_index.tolist() == [1, 2, 3, 4, 6, 8, 9, 10]
    assert num_tokens(mixed, PER_TILE) == 8
    assert num_positions(mixed, image_token_id=IMAGE, tokens_per_tile=PER_TILE) == 3 + 2 + 1


def test_numbers_of_tokens_for_other_tiles_are_refused() -> None:
    wrong = replace(example([(IMAGE, False), (8, True)], tiles=(2,)), tokens_per_tile=(1,))
    with pytest.raises(DataError, match="2 tiles, 1 increments and 1 numbers of visual tokens"):
        batch_of([wrong])
    with pytest.raises(DataError, match="3 numbers of visual tokens for 2 tiles"):
        tokens_per_image((1, 1), (1, 1, 4))
