"""Printed text: ink is inside the picture, words are those of the part, answers are true."""

from __future__ import annotations

import numpy as np
import pytest

from cascadevl.tasks import printed
from cascadevl.tasks.printed import LEVELS, Printed
from cascadevl.tasks.text import spelled
from cascadevl.tasks.words import FONTS, font, load_words, words_of_length

LINES = [["alpha", "be"], ["gamma"]]


def test_words_of_the_parts_are_disjoint() -> None:
    train, test = set(load_words("train")), set(load_words("test"))
    assert not train & test
    assert len(train) > 1800
    assert len(test) > 400
    for word in train | test:
        assert word.isascii()
        assert word.islower()
        assert word.isalpha()
        assert 3 <= len(word) <= 8


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
def test_only_words_of_the_part_are_drawn(difficulty: str) -> None:
    for split in ("train", "test"):
        allowed = set(load_words(split))
        for index in range(40):
            scene = Printed(difficulty=difficulty).draw(split, 0, index)
            said = scene.description.split("font: ")[1].replace(";", " ").split()
            assert set(said) <= allowed


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
@pytest.mark.parametrize("px", [112, 224])
def test_text_lies_inside_the_picture(difficulty: str, px: int) -> None:
    task = Printed(difficulty=difficulty, px=px)
    for index in range(40):
        pixels = np.asarray(task.draw("train", 0, index).image, dtype=np.float64)
        paper = pixels[0, 0] if (pixels[0, 0] == pixels[-1, -1]).all() else pixels[0, -1]
        ink = np.abs(pixels - paper).sum(axis=2) > 150
        assert ink.any()
        # A glyph cut off would leave a run of ink on the border.
        border = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
        assert border.sum() <= 3, index
        assert ink.any(axis=1).sum() >= 5


@pytest.mark.parametrize("face", sorted(FONTS))
def test_every_font_draws_every_letter_differently(face: str) -> None:
    level = LEVELS["short"]
    drawn = {
        printed.render(np.random.default_rng(0), [letter * 3], face, level, 64).tobytes()
        for letter in "abcdefghijklmnopqrstuvwxyz"
    }
    assert len(drawn) == 26  # a font without letters would draw one box for all
    assert font(face, 20) is font(face, 20)


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("word", "alpha"),
        ("num_letters", "5"),
        ("first_letter", "a"),
        ("last_letter", "a"),
        ("spell", "a-l-p-h-a"),
        ("line", "alpha be"),
        ("num_words", "3"),
        ("first_word", "alpha"),
        ("last_word", "gamma"),
        ("num_lines", "2"),
        ("all_lines", "alpha be\ngamma"),
    ],
)
def test_answers_by_hand(kind: str, answer: str) -> None:
    assert printed.ask(np.random.default_rng(0), kind, LINES, 1).answer == answer


def test_numbered_words_and_lines() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        question = printed.ask(generator, "nth_word", LINES, 1)
        number = int(question.prompt.rstrip("?").split()[-1])
        assert question.answer == LINES[0][number - 1]
        question = printed.ask(generator, "nth_line", LINES, 1)
        number = int(question.prompt.rstrip("?").split()[-1])
        assert question.answer == " ".join(LINES[number - 1])


def test_words_by_length() -> None:
    assert {len(word) for word in words_of_length("test", 4, 5)} == {4, 5}
    assert spelled("cat") == "c-a-t"
