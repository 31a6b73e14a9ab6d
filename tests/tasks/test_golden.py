"""What the tasks ask is what was frozen (tests/golden/regenerate.py says how and why)."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.golden import regenerate

FROZEN = json.loads(regenerate.PATH.read_text(encoding="utf-8"))
PICTURE_TOLERANCE = 6
"""Of 255: another font library moves the mean of a 28 px field of text by a few levels."""


@pytest.fixture(scope="module")
def current() -> dict[str, dict[str, object]]:
    return regenerate.as_json(regenerate.snapshot())


@pytest.mark.parametrize("part", ["levels", "colours", "fonts", "digits", "words", "tables"])
def test_material_is_frozen(part: str, current: dict[str, dict[str, object]]) -> None:
    assert current[part] == FROZEN[part]


def test_the_same_scenes_are_frozen(current: dict[str, dict[str, object]]) -> None:
    assert list(current["scenes"]) == list(FROZEN["scenes"])


@pytest.mark.parametrize("name", list(FROZEN["scenes"]))
def test_scenes_are_frozen(name: str, current: dict[str, dict[str, dict[str, object]]]) -> None:
    scene, frozen = current["scenes"][name], FROZEN["scenes"][name]
    assert scene["first"] == frozen["first"]  # the readable part: shows what changed
    assert scene["kinds"] == frozen["kinds"]
    assert scene["questions"] == frozen["questions"]
    for picture, kept in zip(scene["pictures"], frozen["pictures"], strict=True):
        assert np.abs(np.subtract(picture, kept)).max(initial=0) <= PICTURE_TOLERANCE
