"""Boxes are drawn where they are said to be, in their two colours."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from cascadevl.eval.box_drawing import GIVEN_COLOUR, TRUE_COLOUR, with_boxes

WHITE = (255, 255, 255)


def extent(image: PIL.Image.Image, colour: tuple[int, int, int]) -> tuple[int, ...] | None:
    """Left, top, right and bottom of all pixels of a colour."""
    places = np.argwhere((np.asarray(image) == colour).all(axis=2))
    if not len(places):
        return None
    (top, left), (bottom, right) = places.min(axis=0), places.max(axis=0)
    return int(left), int(top), int(right), int(bottom)


@pytest.fixture
def paper() -> PIL.Image.Image:
    return PIL.Image.new("RGB", (201, 101), WHITE)


def test_boxes_are_thousandths_of_the_sides(paper: PIL.Image.Image) -> None:
    drawn = with_boxes(
        paper, given="<box>[[100, 200, 300, 600]]</box>", truth="[[500, 100, 900, 900]]"
    )
    assert extent(drawn, GIVEN_COLOUR) == (20, 20, 60, 60)
    assert extent(drawn, TRUE_COLOUR) == (100, 10, 180, 90)
    inside = np.asarray(drawn)[14:87, 104:177]
    assert (inside == WHITE).all()  # an outline, not a surface
    assert extent(paper, GIVEN_COLOUR) is None  # a copy


def test_answers_that_are_no_boxes_draw_none(paper: PIL.Image.Image) -> None:
    for given in ("top left", "[[300, 300, 200, 900]]", "[[10, 20, 30]]", ""):
        drawn = with_boxes(paper, given=given, truth="[[0, 0, 1000, 1000]]")
        assert extent(drawn, GIVEN_COLOUR) is None
        assert extent(drawn, TRUE_COLOUR) == (0, 0, 200, 100)


def test_what_leaves_the_picture_ends_at_its_edge(paper: PIL.Image.Image) -> None:
    drawn = with_boxes(paper, given="[[500, 500, 4000, 2000]]", truth="")
    assert extent(drawn, GIVEN_COLOUR) == (100, 50, 200, 100)
