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


def test_invented_words_are_new_and_never_held_out() -> None:
    task = Printed(difficulty="line", num_questions=9, invented=0.5)
    train, test = set(load_words("train")), set(load_words("test"))
    seen: list[str] = []
    for index in range(200):
        seen += task.draw("train", 0, index).description.split("font: ")[1].split()
    assert not set(seen) & test
    assert sum(word not in train for word in seen) / len(seen) == pytest.approx(0.5, abs=0.1)
    assert all(word.isalpha() and 3 <= len(word) <= 6 for word in seen)


def test_invention_is_for_training_alone() -> None:
    plain = Printed(difficulty="lines", num_questions=9)
    inventing = Printed(difficulty="lines", num_questions=9, invented=1.0)
    for index in range(20):
        one, other = plain.draw("test", 0, index), inventing.draw("test", 0, index)
        assert one.questions == other.questions
        assert one.image is not None
        assert other.image is not None
        assert one.image.tobytes() == other.image.tobytes()
