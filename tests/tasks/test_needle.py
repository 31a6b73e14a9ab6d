"""The needle: one handwritten number, wherever it is, and nothing else handwritten."""

from __future__ import annotations

import numpy as np
import pytest

from cascadevl.errors import ConfigError
from cascadevl.tasks.base import to_prompt, to_record
from cascadevl.tasks.needle import Needle
from cascadevl.types import ImageRef


def pixels(image: object) -> bytes:
    return np.asarray(image).tobytes()


def test_all_pictures_but_one_come_from_the_pool() -> None:
    task = Needle(px=48, num_pictures=(6, 6), num_questions=3)
    pool = {pixels(image) for index in range(60) for image in task.draw("train", 1, index).images}
    # 60 haystacks of five straws: were straws drawn afresh, 300 of them would differ.
    assert 60 < len(pool) < 60 + 5 * 60
    scene = task.draw("train", 1, 0)
    assert len(scene.images) == 6
    number = {question.kind: question.answer for question in scene.questions}
    assert (number["first_digit"], number["last_digit"]) == (
        number["number"][0],
        number["number"][-1],
    )


def test_every_place_and_every_length_occurs() -> None:
    task = Needle(px=48, num_pictures=(1, 3))
    straws = {
        pixels(image)
        for index in range(300)
        for image in Needle(px=48, num_pictures=(8, 8)).draw("train", 2, index).images
    }
    seen = set()
    for index in range(80):
        images = task.draw("train", 5, index).images
        new = [place for place, image in enumerate(images) if pixels(image) not in straws]
        if len(new) == 1:
            seen.add((len(images), new[0]))
    assert seen == {(length, place) for length in (1, 2, 3) for place in range(length)}


def test_the_parts_share_no_straw() -> None:
    task = Needle(px=48, num_pictures=(8, 8))
    parts = [
        {pixels(image) for index in range(20) for image in task.draw(split, 1, index).images}
        for split in ("train", "test")
    ]
    assert not parts[0] & parts[1]


def test_pictures_stand_side_by_side_before_the_question() -> None:
    scene = Needle(px=48, num_pictures=(3, 3)).draw("test", 0, 0)
    (turn,) = to_prompt(scene, scene.questions[0])
    assert [type(part) for part in turn.parts] == [ImageRef, ImageRef, ImageRef, str]
    record = to_record(scene, task="needle")
    assert record.messages[0].parts == turn.parts[:3]


@pytest.mark.parametrize("num_pictures", [(0, 3), (4, 2)])
def test_an_impossible_haystack_is_refused(num_pictures: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="from 1 on, the smaller one first"):
        Needle(num_pictures=num_pictures)
