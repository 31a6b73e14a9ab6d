"""easy-VQA as its author made it: nothing lost, nothing crossing over between its parts."""

from __future__ import annotations

import easy_vqa as package
import numpy as np
import pytest

from cascadevl.tasks.easy_vqa import COLOURS, SHAPES, EasyVQA, load_pictures

RGB = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}


def test_every_question_is_there_in_its_own_part() -> None:
    for split, load in (
        ("train", package.get_train_questions),
        ("test", package.get_test_questions),
    ):
        prompts, answers, numbers = load()
        pictures = load_pictures(split)
        assert len(pictures) == len(set(numbers))
        assert sum(len(picture.asked) for picture in pictures) == len(prompts)
        first = pictures[0]
        theirs = [
            (prompt, answer)
            for prompt, answer, number in zip(prompts, answers, numbers, strict=True)
            if number == int(first.path.stem)
        ]
        assert list(first.asked) == theirs
        assert first.path.parent.parent.name == split


def test_a_round_through_the_indices_shows_every_picture_once() -> None:
    task = EasyVQA(px=8)
    names = [task.draw("test", 4, index).scene_id.split("/")[3] for index in range(1000)]
    assert len(set(names)) == 1000
    second = [task.draw("test", 4, index).scene_id.split("/")[3] for index in range(1000, 1010)]
    assert second != names[:10]


def test_questions_vary_between_rounds() -> None:
    task = EasyVQA(num_questions=3)
    assert len({task.draw("train", seed, 0).questions for seed in range(5)}) == 5


@pytest.mark.parametrize("split", ["train", "test"])
def test_descriptions_agree_with_the_pixels(split: str) -> None:
    full = 0
    for index in range(120):
        scene = EasyVQA(px=64).draw(split, 0, index)
        words = scene.description.rstrip(".").split()
        assert words[0] == "One"
        colour = next((word for word in words if word in COLOURS), None)
        if colour is None:
            continue
        pixels = np.asarray(scene.image).reshape(-1, 3).astype(int)
        distance = {name: np.abs(pixels - rgb).sum(axis=1).min() for name, rgb in RGB.items()}
        assert min(distance, key=distance.__getitem__) == colour
        full += any(word in SHAPES for word in words)
    assert full > 90
