"""Handwritten numbers are where and what they are said to be, and test scans stay unseen."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
from sklearn.datasets import load_digits

from cascadevl.tasks import handwriting
from cascadevl.tasks.handwriting import LEVELS, Handwriting, draw_number, load_scans, render_rows


def test_parts_are_disjoint_stratified_and_complete() -> None:
    train, test = load_scans("train"), load_scans("test")
    assert not set(train.indices.tolist()) & set(test.indices.tolist())
    assert len(train.indices) + len(test.indices) == 1797
    for digit in range(10):
        share = len(test.by_class[digit]) / (len(test.by_class[digit]) + len(train.by_class[digit]))
        assert share == pytest.approx(0.2, abs=0.005)


def test_no_test_scan_equals_a_training_scan() -> None:
    train = {image.tobytes() for image in load_scans("train").images}
    assert not any(image.tobytes() in train for image in load_scans("test").images)


def test_scans_are_labelled_as_the_data_set_says() -> None:
    data = load_digits()
    for split in ("train", "test"):
        scans = load_scans(split)
        for digit, members in enumerate(scans.by_class):
            assert (data.target[scans.indices[list(members)]] == digit).all()
    assert (load_scans("test").images[0] // 16 == data.images[load_scans("test").indices[0]]).any()


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
@pytest.mark.parametrize("px", [112, 224])
def test_digits_stand_where_said_and_nowhere_else(difficulty: str, px: int) -> None:
    level, scans = LEVELS[difficulty], load_scans("test")
    for seed in range(15):
        generator = np.random.default_rng([7, seed])
        rows = [draw_number(generator, level.num_digits) for _ in range(level.num_rows)]
        image, placed = render_rows(generator, rows, level, scans, px)
        pixels = np.asarray(image, dtype=np.float64)
        darkness = (pixels[0, 0] - pixels).sum(axis=2)  # the corner is paper
        assert [str(digit.digit) for digit in placed] == list("".join(rows))
        covered = np.zeros(darkness.shape, dtype=np.bool_)
        for digit in placed:
            left, top, right, bottom = digit.box_px
            assert 0 <= left < right <= px
            assert 0 <= top < bottom <= px
            assert not covered[top:bottom, left:right].any()  # digits do not overlap
            covered[top:bottom, left:right] = True
            assert digit.scan in scans.by_class[digit.digit]
            assert likeness(darkness[top:bottom, left:right], scans.images[digit.scan]) > 0.97
        assert not darkness[~covered].any()


def likeness(darkness: np.ndarray, scan: np.ndarray) -> float:
    """Correlation of a scan with what was drawn of it, averaged over its 8 x 8 fields again."""
    drawn = PIL.Image.fromarray(darkness.astype(np.float32))
    reduced = np.asarray(drawn.resize((8, 8), PIL.Image.Resampling.BOX))
    return float(np.corrcoef(scan.ravel(), reduced.ravel())[0, 1])


def test_grey_levels_survive_the_enlargement() -> None:
    """Strokes are told apart by their grey: an enlarged scan is no picture of two colours."""
    level, scans = LEVELS["one"], load_scans("train")
    image, (digit,) = render_rows(np.random.default_rng(2), ["8"], level, scans, 112)
    left, top, right, bottom = digit.box_px
    grey = np.asarray(image.convert("L"), dtype=np.float64)[top:bottom, left:right]
    share = (grey.max() - grey) / (grey.max() - grey.min())
    assert 0.2 < ((share > 0.15) & (share < 0.85)).mean() < 0.7


def test_digits_are_large_enough_to_learn_from() -> None:
    """The demo's difficulties keep digits at 40 px or more in a 112 px picture."""
    for difficulty in ("one", "two"):
        level, sides = LEVELS[difficulty], []
        for seed in range(150):
            generator = np.random.default_rng(seed)
            rows = [draw_number(generator, level.num_digits)]
            _, placed = render_rows(generator, rows, level, load_scans("train"), 112)
            for left, top, right, bottom in (digit.box_px for digit in placed):
                sides += [right - left, bottom - top]
        assert min(sides) >= 40
        assert 112 * level.size[0] >= 41  # an edge rounded inwards takes at most one pixel


def test_numbers_have_uniform_lengths_and_no_leading_zero() -> None:
    generator = np.random.default_rng(0)
    numbers = [draw_number(generator, (1, 4)) for _ in range(2000)]
    shares = np.bincount([len(number) for number in numbers], minlength=5)[1:] / len(numbers)
    assert shares == pytest.approx([0.25] * 4, abs=0.04)
    assert not any(number[0] == "0" and len(number) > 1 for number in numbers)
    assert any(number == "0" for number in numbers)


@pytest.mark.parametrize(
    ("kind", "rows", "answer", "reasoning"),
    [
        ("number", ["407"], "407", None),
        ("first_digit", ["407"], "4", None),
        ("last_digit", ["407"], "7", None),
        ("num_digits", ["407"], "3", None),
        ("largest_digit", ["407"], "7", None),
        ("parity", ["407"], "no", None),
        ("parity", ["40"], "yes", None),
        ("digit_sum", ["407"], "11", "4 + 0 = 4, 4 + 7 = 11"),
        ("digit_sum", ["4"], "4", None),
        ("upper", ["12", "90"], "12", None),
        ("lower", ["12", "90"], "90", None),
        ("larger", ["9", "12"], "12", None),
        ("addition", ["7", "5"], "12", "7 + 5 = 12"),
    ],
)
def test_answers_by_hand(kind: str, rows: list[str], answer: str, reasoning: str | None) -> None:
    question = handwriting.ask(np.random.default_rng(0), kind, rows, 1)
    assert (question.answer, question.reasoning) == (answer, reasoning)


def test_held_out_scans_are_drawn_for_test() -> None:
    """The pictures of the two parts differ even for the very same numbers and places."""
    level = LEVELS["one"]
    left, right = (
        render_rows(np.random.default_rng(1), ["8"], level, load_scans(split), 112)[1][0]
        for split in ("train", "test")
    )
    scans = {split: load_scans(split).indices for split in ("train", "test")}
    assert scans["train"][left.scan] != scans["test"][right.scan]


def test_a_row_of_four_fits() -> None:
    task = Handwriting(difficulty="four", px=112)
    assert any(len(task.draw("train", 0, i).description.split("digits")[1]) > 8 for i in range(20))


def test_placed_scans_are_those_of_the_drawn_scene() -> None:
    task = Handwriting(difficulty="add", num_questions=4)
    for index in range(5):
        scene, placed = task.draw_placed("test", 2, index)
        same = task.draw("test", 2, index)
        assert scene.scene_id == same.scene_id
        assert scene.image is not None
        assert same.image is not None
        assert (np.asarray(scene.image) == np.asarray(same.image)).all()
        answers = {question.kind: question.answer for question in same.questions}
        assert "".join(str(each.digit) for each in placed) == answers["upper"] + answers["lower"]
