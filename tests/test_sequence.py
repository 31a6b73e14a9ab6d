"""Expansion of image slots and V2PE positions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import positions_by_hand

from cascadevl.errors import DataError
from cascadevl.sequence import INCREMENTS, Expanded, expand
from cascadevl.types import NO_PARENT

TEXT, IMAGE = 7, 99


def expanded(
    segments: list[list[int | float | tuple[int, float]]],
    parents: tuple[int, ...] = (NO_PARENT,),
    *,
    ceil_after_image: bool = False,
) -> Expanded:
    """Expand segments written as lists of 0 (a text token) and (visual tokens, increment)."""
    flat = [(item, number) for number, items in enumerate(segments) for item in items]
    images = [item for item, _ in flat if isinstance(item, tuple)]
    return expand(
        np.array([IMAGE if isinstance(item, tuple) else TEXT for item, _ in flat], dtype=np.int64),
        np.zeros(len(flat), dtype=bool),
        np.array([number for _, number in flat], dtype=np.int64),
        parents,
        image_token_id=IMAGE,
        tokens_per_image=[tokens for tokens, _ in images],
        increments=[increment for _, increment in images],
        ceil_after_image=ceil_after_image,
    )


def by_hand(
    segments: list[list[int | float | tuple[int, float]]],
    parents: tuple[int, ...],
    *,
    ceil_after_image: bool,
) -> list[Fraction]:
    tokens = []
    for number, items in enumerate(segments):
        for item in items:
            if isinstance(item, tuple):
                count, increment = item
                kinds = ["visual"] * (count - 1) + ["visual_end"]
                tokens += [(kind, Fraction(increment), number) for kind in kinds]
            else:
                tokens.append(("text", Fraction(1), number))
    return positions_by_hand.positions(tokens, list(parents), ceil_after_image=ceil_after_image)


def test_the_formula_on_paper() -> None:
    # text, <img>, 4 visual tokens of 1/4, </img>, text: the image is one position long in all
    found = expanded([[0, 0, (4, 0.25), 0, 0]])
    assert found.position_ids.tolist() == [0, 1, 1.25, 1.5, 1.75, 2, 3, 4]
    assert found.position_ids.dtype == np.float32
    assert found.is_visual.tolist() == [False] * 2 + [True] * 4 + [False] * 2
    assert found.input_ids.tolist() == [TEXT, TEXT, IMAGE, IMAGE, IMAGE, IMAGE, TEXT, TEXT]


def test_without_ceil_the_fraction_stays() -> None:
    assert expanded([[0, (3, 0.25), 0, 0]]).position_ids.tolist() == [
        0,
        0.25,
        0.5,
        0.75,
        1.75,
        2.75,
    ]


def test_ceil_after_image_as_in_the_public_v2pe_code() -> None:
    # last visual token at 0.75; last = ceil(0.75) = 1, so </img> sits at ceil + 1 = 2
    found = expanded([[0, (3, 0.25), 0, (2, 0.5), 0]], ceil_after_image=True)
    assert found.position_ids.tolist() == [0, 0.25, 0.5, 0.75, 2, 2.5, 3, 4]


def test_ceil_is_a_matter_of_the_image_not_of_float_dust() -> None:
    # ten steps of 0.7 are 7, but float64 adds them up to a little more, ten of 0.6 to less
    found = expanded([[0, (10, 0.7), 0, (10, 0.6), 0]], ceil_after_image=True)
    assert found.position_ids[[11, 22]].tolist() == [8, 15]


def test_the_first_token_of_a_conversation_sits_at_zero_even_if_visual() -> None:
    assert expanded([[(3, 0.5), 0]]).position_ids.tolist() == [0, 0.5, 1, 2]


def test_increment_one_gives_integer_positions_exactly() -> None:
    found = expanded([[0, (256 * 13, 1.0), 0, 0, (256, 1.0)] + [0] * 100])
    assert found.position_ids.tolist() == list(range(len(found.input_ids)))


def test_float32_is_exact_up_to_two_to_the_sixteen() -> None:
    around = 2**16 - 2
    found = expanded([[0] * around + [(512, 1 / 256)]]).position_ids
    assert found[around:].tolist() == [float(around - 1 + Fraction(k, 256)) for k in range(1, 513)]
    assert found[-1] == 2**16 - 1
    assert len(set(found.tolist())) == len(found)


def test_bfloat16_positions_would_merge_neighbours() -> None:
    found = torch.from_numpy(expanded([[0] * 1000 + [(256, 1 / 256), 0]]).position_ids)
    assert len(found.unique()) == len(found) == 1257
    # 999 text positions and one image: half of the text and all of the image fall together
    assert len(found[1000:1256].bfloat16().unique()) == 1
    assert len(found.bfloat16().unique()) < 600
    # even within the first 16 positions an image of 256 tokens is no longer told apart
    early = torch.from_numpy(expanded([[0] * 10 + [(256, 1 / 256), 0]]).position_ids)
    assert len(early[10:266].bfloat16().unique()) < 20


def test_branches_continue_from_their_parent_not_from_each_other() -> None:
    segments = [[0, (2, 0.5), 0], [0, 0], [0], [0]]
    found = expanded(segments, (NO_PARENT, 0, 0, 1))
    assert found.position_ids.tolist() == [0, 0.5, 1, 2, 3, 4, 3, 5]
    assert found.parents.tolist() == [-1] * 4 + [0, 0, 0, 1]
    assert found.segments.tolist() == [0] * 4 + [1, 1, 2, 3]


def test_a_branch_after_an_image_starts_behind_the_rounding() -> None:
    segments: list[list[int | float | tuple[int, float]]] = [[0, (3, 0.25)], [0, (1, 0.5)], [0]]
    found = expanded(segments, (NO_PARENT, 0, 0), ceil_after_image=True)
    assert found.position_ids.tolist() == [0, 0.25, 0.5, 0.75, 2, 2.5, 2]


def test_a_segment_without_tokens_hands_its_parents_end_on() -> None:
    found = expanded([[0, 0], [], [0]], (NO_PARENT, 0, 1))
    assert found.position_ids.tolist() == [0, 1, 2]


def test_samples_laid_side_by_side_restart_at_zero() -> None:
    found = expanded([[0, (2, 0.25)], [0, 0], [(2, 0.5)]], (NO_PARENT,) * 3)
    assert found.position_ids.tolist() == [0, 0.25, 0.5, 0, 1, 0, 0.5]


def test_visual_tokens_are_never_trained() -> None:
    found = expand(
        np.array([TEXT, IMAGE, TEXT]),
        np.array([True, True, False]),
        np.zeros(3, dtype=np.int64),
        (NO_PARENT,),
        image_token_id=IMAGE,
        tokens_per_image=[3],
        increments=[1.0],
    )
    assert found.trained.tolist() == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("tokens", "increments"), [([4], [1.0]), ([4, 4], [1.0]), ([4, 4, 4], [1.0] * 3)]
)
def test_counts_that_differ_are_refused(tokens: list[int], increments: list[float]) -> None:
    with pytest.raises(DataError, match=r"shelf\.jsonl:3: 2 image slots") as caught:
        expand(
            np.array([IMAGE, TEXT, IMAGE]),
            np.zeros(3, dtype=bool),
            np.zeros(3, dtype=np.int64),
            (NO_PARENT,),
            image_token_id=IMAGE,
            tokens_per_image=tokens,
            increments=increments,
            source="shelf.jsonl:3",
        )
    assert caught.value.kind == "image_count"


item = st.one_of(st.just(0), st.tuples(st.integers(1, 9), st.sampled_from(INCREMENTS)))


@st.composite
def samples(draw: st.DrawFn) -> tuple[list[list[int | float | tuple[int, float]]], tuple[int, ...]]:
    segments = draw(st.lists(st.lists(item, min_size=1, max_size=6), min_size=1, max_size=6))
    parents = [draw(st.integers(NO_PARENT, number - 1)) for number in range(len(segments))]
    return segments, tuple(parents)


@given(samples(), st.booleans())
def test_positions_equal_those_by_hand(
    sample: tuple[list[list[int | float | tuple[int, float]]], tuple[int, ...]],
    ceil_after_image: bool,
) -> None:
    segments, parents = sample
    found = expanded(segments, parents, ceil_after_image=ceil_after_image)
    wanted = by_hand(segments, parents, ceil_after_image=ceil_after_image)
    assert found.position_ids.tolist() == [float(position) for position in wanted]


@given(st.lists(item, min_size=1, max_size=12))
def test_every_step_is_one_or_the_increment(items: list[int | tuple[int, float]]) -> None:
    found = expanded([items])
    steps = np.diff(found.position_ids)
    increments = np.repeat(
        [i[1] if isinstance(i, tuple) else 1.0 for i in items],
        [i[0] if isinstance(i, tuple) else 1 for i in items],
    )
    assert found.position_ids[0] == 0
    assert (steps == increments[1:]).all()
    assert (found.is_visual == (found.input_ids == IMAGE)).all()
