"""Pages: what the labels say stands where they say it."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from cascadevl.tasks import pages
from cascadevl.tasks.pages import CLASSES, Page, Pages
from cascadevl.tasks.shape_drawing import COLOURS


@pytest.fixture(scope="module")
def drawn() -> list[Page]:
    return [Pages()[index] for index in range(60)]


def test_a_page_is_a_function_of_part_seed_and_number(drawn: list[Page]) -> None:
    again = Pages()[7]
    assert again.image.tobytes() == drawn[7].image.tobytes()
    assert (again.classes == drawn[7].classes).all()
    others = [Pages(split="test")[7], Pages(seed=1)[7], Pages()[8]]
    assert len({page.image.tobytes() for page in (again, *others)}) == 4


def test_every_class_occurs() -> None:
    seen = np.zeros(len(CLASSES), dtype=bool)
    for index in range(400):
        seen[np.unique(Pages(seed=2)[index].classes)] = True
    assert [name for name, there in zip(CLASSES, seen, strict=True) if not there] == []


def test_a_patch_within_a_shape_has_its_colour(drawn: list[Page]) -> None:
    checked = 0
    for page in drawn:
        pixels = np.asarray(page.image)
        for row, column in zip(*np.nonzero(page.centres), strict=True):
            name = CLASSES[page.classes[row, column]]
            if name.endswith((" circle", " square", " star")):
                patch = pixels[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
                assert (patch == COLOURS[name.split()[0]]).all(axis=-1).any(), name
                checked += 1
    assert checked > 30


def test_patches_of_nothing_are_paper(drawn: list[Page]) -> None:
    for page in drawn[:20]:
        pixels = np.asarray(page.image).reshape(16, 14, 16, 14, 3).swapaxes(1, 2)
        values, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
        paper = values[counts.argmax()]
        plain = (pixels == paper).all(axis=-1).mean(axis=(2, 3))
        assert plain[page.classes == 0].mean() > 0.9
        assert plain[page.classes > 0].mean() < 0.75


def test_letters_are_labelled_where_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a page that holds one text alone, the labels in reading order are the text."""
    monkeypatch.setattr(pages, "_KINDS", ("text",))
    monkeypatch.setattr(pages, "_TRIES", 1)
    read = 0
    for index in range(300):
        page = Pages(px=448, seed=3)[index]
        rows = np.unique(np.nonzero(page.centres)[0])
        if len(rows) != 1:
            continue
        columns = np.nonzero(page.centres[rows[0]])[0]
        text = "".join(CLASSES[number] for number in page.classes[rows[0], columns])
        if len(columns) < 4 or not text.isalpha():
            continue
        ink = np.asarray(page.image.convert("L"), dtype=float)
        ink = np.abs(ink - np.median(ink)).max(axis=0)
        left, right = np.nonzero(ink > 40)[0][[0, -1]]
        # The first middle lies in the first letter, the last one in the last.
        width = (right - left) / len(text)
        assert left <= (columns[0] + 1) * 14 <= left + 2.5 * width + 14
        assert right - 2.5 * width - 14 <= columns[-1] * 14 <= right
        read += 1
    assert read >= 3


def test_held_out_scans_and_words_stay_out() -> None:
    parts = [
        {Pages(split=split)[index].image.tobytes() for index in range(30)}
        for split in ("train", "test")
    ]
    assert not parts[0] & parts[1]


def test_a_place_taken_is_not_given_twice() -> None:
    sheet = pages._Sheet(224, 14, (255, 255, 255), (0, 0, 0))
    generator = np.random.default_rng(0)
    boxes = [sheet.place(generator, 60.0, 60.0) for _ in range(200)]
    given = [box for box in boxes if box is not None]
    cover = PIL.Image.new("I", (224, 224))
    counts = np.zeros(cover.size, dtype=int)
    for left, top, right, bottom in given:
        counts[round(top) : round(bottom), round(left) : round(right)] += 1
    # Boxes may touch along a line, which rounding makes a pixel wide.
    assert (counts > 1).mean() < 0.02
    assert 3 <= len(given) < 14
    assert sheet.place(generator, 300.0, 10.0) is None


def test_every_second_page_is_a_tile_of_a_larger_one() -> None:
    cut, whole = Pages(px=112, tiles=True), Pages(px=112)
    for index in range(0, 20, 2):
        assert cut[index].image.tobytes() == whole[index].image.tobytes()
    counts = []
    for index in range(1, 40, 2):
        page = cut[index]
        assert page.image.size == (112, 112)
        assert page.classes.shape == page.centres.shape == (8, 8)
        assert page.image.tobytes() != whole[index].image.tobytes()
        counts.append(int(page.centres.sum()))
    assert sum(counts) / len(counts) > 3


def test_a_tile_keeps_what_its_patches_hold() -> None:
    """Shapes have pure colours: the labels of a tile are right where the colours are."""
    checked = 0
    for index in range(1, 120, 2):
        page = Pages(px=112, tiles=True, seed=4)[index]
        pixels = np.asarray(page.image)
        for row, column in zip(*np.nonzero(page.centres), strict=True):
            name = CLASSES[page.classes[row, column]]
            if name.endswith((" circle", " square", " star")):
                patch = pixels[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
                assert (patch == COLOURS[name.split()[0]]).all(axis=-1).any(), name
                checked += 1
    assert checked > 20
