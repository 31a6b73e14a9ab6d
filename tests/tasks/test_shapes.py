"""Drawn shapes agree with what is said of them, found again in the pixels alone."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from cascadevl.tasks import shapes
from cascadevl.tasks.base import Question, pick
from cascadevl.tasks.grounding import Grounding
from cascadevl.tasks.shape_drawing import COLOURS, PLACES, SHAPES, Thing
from cascadevl.tasks.shapes import LEVELS, Shapes

Found = tuple[str, str, str, tuple[float, float, float, float]]


def find_things(pixels: np.ndarray) -> list[Found]:
    """Colour, shape and place of every object, by connected components of pure colour."""
    found = []
    for name, colour in COLOURS.items():
        mask = np.abs(pixels.astype(int) - colour).sum(axis=2) < 60
        labels, count = ndimage.label(mask)
        for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            blob = labels[rows, columns] == number
            if blob.sum() < 20:  # smoothed edges between two colours
                continue
            side = len(pixels)
            box = (
                columns.start / side,
                rows.start / side,
                columns.stop / side,
                rows.stop / side,
            )
            cell = int((box[1] + box[3]) / 2 * 3) * 3 + int((box[0] + box[2]) / 2 * 3)
            found.append((name, shape_of(blob), PLACES[cell], box))
        assert count >= 0
    return found


def shape_of(blob: np.ndarray) -> str:
    """By how much of its box a shape fills: 1, pi/4, 1/2, less."""
    filled = float(blob.mean())
    if filled > 0.9:
        return "square"
    if filled > 0.68:
        return "circle"
    corners = blob[-max(1, len(blob) // 8) :].mean()  # a triangle stands on a full side
    return "triangle" if corners > 0.75 else "star"


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
@pytest.mark.parametrize("px", [112, 224])
def test_pictures_show_what_the_description_says(difficulty: str, px: int) -> None:
    task = Shapes(difficulty=difficulty, px=px)
    for index in range(25):
        scene = task.draw("train", 11, index)
        listed = scene.description.split(": ")[1].rstrip(".").split(", ")
        found = find_things(np.asarray(scene.image))
        names = [f"{colour} {shape} {place}" for colour, shape, place, _ in found]
        said = [re.sub(r"^(small|large) ", "", name) for name in listed]
        assert Counter(names) == Counter(said), f"scene {index}"


def answer_from_pixels(question: Question, found: list[Found]) -> str | None:
    """The answer to a question, by reading the prompt and counting what was found."""
    words = question.prompt.rstrip("?.").split()
    match question.kind:
        case "count":
            return str(len(found))
        case "count_color":
            return str(sum(colour == words[2] for colour, *_ in found))
        case "count_shape":
            return str(sum(f"{shape}s" == words[2] for _, shape, *_ in found))
        case "existence":
            wanted = (words[-2], words[-1])
            return "yes" if any((colour, shape) == wanted for colour, shape, *_ in found) else "no"
        case "color":
            colours = [colour for colour, shape, *_ in found if shape == words[-1]]
            return colours[0] if len(colours) == 1 else None
        case "shape":
            kinds = [shape for colour, shape, *_ in found if colour == words[-1]]
            return kinds[0] if len(kinds) == 1 else None
        case "place":
            places = [p for colour, shape, p, _ in found if [colour, shape] == words[-2:]]
            return places[0] if len(places) == 1 else None
        case "list":
            return ", ".join(f"{colour} {shape} {place}" for colour, shape, place, _ in found)
    raise AssertionError(question.kind)


def test_answers_follow_from_the_pixels() -> None:
    task = Shapes(difficulty="full", num_questions=20)
    asked: Counter[str] = Counter()
    for index in range(60):
        scene = task.draw("test", 2, index)
        found = find_things(np.asarray(scene.image))
        for question in scene.questions:
            answer = answer_from_pixels(question, found)
            assert answer is not None, question
            assert question.check(answer), (question, answer)
            asked[question.kind] += 1
    assert set(asked) == set(task.kinds)


def test_objects_keep_apart_and_inside() -> None:
    for difficulty, level in LEVELS.items():
        for seed in range(100):
            things = shapes.draw_things(np.random.default_rng(seed), level)
            assert len({thing.cell for thing in things}) == len(things), difficulty
            for thing in things:
                left, top, right, bottom = thing.box
                assert thing.cell % 3 / 3 < left < right < (thing.cell % 3 + 1) / 3
                assert thing.cell // 3 / 3 < top < bottom < (thing.cell // 3 + 1) / 3


def test_sizes_are_told_apart() -> None:
    widths: dict[str, list[float]] = {"small": [], "large": []}
    for seed in range(200):
        for thing in shapes.draw_things(np.random.default_rng(seed), LEVELS["sizes"]):
            widths[thing.size].append(thing.box[2] - thing.box[0])
    assert min(widths["large"]) > 1.4 * max(widths["small"])


def test_counts_are_uniform() -> None:
    counts = [
        len(shapes.draw_things(np.random.default_rng(seed), LEVELS["full"])) for seed in range(1800)
    ]
    shares = np.bincount(counts, minlength=7)[1:] / len(counts)
    assert shares == pytest.approx([1 / 6] * 6, abs=0.03)


def test_half_of_the_denials_are_hard() -> None:
    """Colour and shape are both in the picture, but not together."""
    things = [
        Thing(shape="circle", colour="red", size="", cell=0, box=(0.0, 0.0, 0.2, 0.2)),
        Thing(shape="square", colour="blue", size="", cell=8, box=(0.7, 0.7, 0.9, 0.9)),
    ]
    generator = np.random.default_rng(0)
    prompts: Counter[str] = Counter()
    for _ in range(800):
        question = shapes.ask(generator, "existence", things, LEVELS["easy"], 1)
        assert question is not None
        prompts[question.prompt if question.answer == "no" else "yes"] += 1
    assert prompts["yes"] / 800 == pytest.approx(0.5, abs=0.06)
    hard = prompts["Is there a red square?"] + prompts["Is there a blue circle?"]
    assert hard / (800 - prompts["yes"]) > 0.5


def test_ambiguous_questions_are_not_asked() -> None:
    things = [
        Thing(shape="circle", colour="red", size="", cell=cell, box=(0.0, 0.0, 0.2, 0.2))
        for cell in (0, 1)
    ]
    for kind in ("color", "shape", "place"):
        assert shapes.ask(np.random.default_rng(0), kind, things, LEVELS["full"], 1) is None


def test_articles() -> None:
    assert shapes.with_article("orange", "star") == "an orange star"
    assert shapes.with_article("red", "star") == "a red star"


def test_boxes_are_where_the_pixels_are() -> None:
    task = Grounding(difficulty="full", num_questions=20, px=224)
    checked = 0
    for index in range(25):
        scene = task.draw("train", 0, index)
        found = find_things(np.asarray(scene.image))
        for question in scene.questions:
            name = question.prompt.split("<ref>")[1].split("</ref>")[0]
            boxes = [
                [round(edge * 1000) for edge in box]
                for colour, shape, _, box in found
                if name in ("shape", f"{colour} {shape}")
            ]
            assert question.check(str(boxes)), (question, boxes)
            assert not question.check(str([[0, 0, 90, 90]] * len(boxes)))
            checked += 1
    assert checked > 50


def test_pick_reaches_every_option() -> None:
    generator = np.random.default_rng(0)
    assert {pick(generator, "abc") for _ in range(60)} == {"a", "b", "c"}


def test_worked_steps_list_the_shapes_up_to_the_one_asked_about() -> None:
    plain = Shapes(difficulty="sizes", num_questions=20)
    worked = Shapes(difficulty="sizes", num_questions=20, worked=True)
    lengths: Counter[int] = Counter()
    for index in range(60):
        told, scene = plain.draw("test", 1, index), worked.draw("test", 1, index)
        listed = next(each.answer for each in told.questions if each.kind == "list").split(", ")
        for one, other in zip(told.questions, scene.questions, strict=True):
            if one.kind not in ("color", "shape", "place", "size"):
                assert other == one
                continue
            assert other.prompt == one.prompt
            assert other.answer == one.answer
            assert other.check(other.response())
            assert other.reasoning is not None
            seen = other.reasoning.split(", ")
            assert seen == listed[: len(seen)]
            # The last one fits what is asked, and no other does.
            asked = one.prompt.rstrip("?").split(" is ")[-1].removeprefix("the ").split(" does")[0]
            words = set(asked.split()) & {*COLOURS, *SHAPES}
            fitting = [thing for thing in listed if words <= set(thing.split())]
            assert fitting == [seen[-1]], (one.prompt, listed)
            lengths[len(seen)] += 1
    assert len(lengths) >= 4
