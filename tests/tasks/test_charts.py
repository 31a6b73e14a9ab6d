"""Charts show their tables: bars, points and slices are measured in the picture."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

from cascadevl.tasks import charts
from cascadevl.tasks.base import Question
from cascadevl.tasks.chart_drawing import PALETTE, Chart, labels_fit, plot_area, render
from cascadevl.tasks.charts import LEVELS, Charts, draw_chart
from cascadevl.tasks.tables import all_tables, load_tables

CHART = Chart(
    form="bar",
    title="Things",
    labels=("Jan", "Feb", "Mar", "Apr"),
    values=(12, 47, 0, 30),
    printed=False,
    colour=0,
    font_size=0.05,
)


def mask_of(image: PIL.Image.Image, colour: int) -> np.ndarray:
    """Pixels of one palette colour, and nothing but it."""
    pixels: np.ndarray = (np.asarray(image) == PALETTE[colour]).all(axis=2)
    return pixels


@pytest.mark.parametrize("px", [112, 224, 448])
@pytest.mark.parametrize("printed", [False, True])
def test_bar_heights_are_the_values(px: int, printed: bool) -> None:
    chart = replace(CHART, printed=printed)
    left, top, right, bottom = plot_area(chart, px)
    mask = mask_of(render(chart, px), chart.colour)
    slot = (right - left) / len(chart.values)
    for number, value in enumerate(chart.values):
        column = mask[:, round(left + slot * (number + 0.5))]
        measured = column.sum() / (bottom - top) * chart.axis_end
        assert measured == pytest.approx(value, abs=chart.axis_end / (bottom - top))


def test_lying_bar_lengths_are_the_values() -> None:
    chart = replace(CHART, form="hbar", colour=3)
    left, top, right, bottom = plot_area(chart, 224)
    mask = mask_of(render(chart, 224), 3)
    slot = (bottom - top) / len(chart.values)
    for number, value in enumerate(chart.values):
        row = mask[round(top + slot * (number + 0.5))]
        measured = row.sum() / (right - left) * chart.axis_end
        assert measured == pytest.approx(value, abs=chart.axis_end / (right - left))


def test_line_points_stand_at_the_values() -> None:
    chart = replace(CHART, form="line", colour=2)
    left, top, right, bottom = plot_area(chart, 448)
    mask = mask_of(render(chart, 448), 2)
    slot = (right - left) / len(chart.values)
    for number, value in enumerate(chart.values):
        rows = np.flatnonzero(mask[:, round(left + slot * (number + 0.5))])
        measured = (bottom - rows.mean()) / (bottom - top) * chart.axis_end
        assert measured == pytest.approx(value, abs=1.0)


def test_pie_slices_are_the_shares() -> None:
    chart = replace(CHART, form="pie", values=(10, 20, 30, 40), colour=1)
    image = render(chart, 448)
    # Above the legend only, whose squares have the same colours.
    top = image.crop((0, 0, 448, round(0.68 * 448)))
    sizes = [mask_of(top, (1 + number) % len(PALETTE)).sum() for number in range(4)]
    assert np.array(sizes) / sum(sizes) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.01)


def test_axis_ticks_are_round_and_reach_over_the_largest_value() -> None:
    for largest in (*range(1, 130), 250, 999):
        chart = replace(CHART, values=(0, largest))
        assert chart.axis_end >= largest
        assert chart.axis_end % chart.step == 0
        assert 1 <= chart.axis_end // chart.step <= 6
        assert str(chart.step).strip("0") in ("1", "2", "5")


def test_long_labels_lie() -> None:
    assert labels_fit(["Jan"] * 4, 0.075)
    assert not labels_fit(["University Farm"] * 4, 0.05)
    assert not labels_fit(["1967"] * 7, 0.05)


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
def test_charts_hold_cells_of_their_table(difficulty: str) -> None:
    level = LEVELS[difficulty]
    generator = np.random.default_rng(0)
    for table in charts.tables_for("train", level):
        chart = draw_chart(generator, table, level)
        cells = dict(zip(table.labels, table.values, strict=True))
        scale = max(cells[label] for label in chart.labels) / max(chart.values)
        assert math.log10(scale) == pytest.approx(round(math.log10(scale)), abs=0.03)
        for label, value in zip(chart.labels, chart.values, strict=True):
            unit = 10.0 ** round(math.log10(scale))
            assert value == pytest.approx(cells[label] / unit, abs=0.51)
        assert len(set(chart.labels)) == len(chart.labels)
        assert 10 ** (level.num_digits - 1) <= max(chart.values) <= 10**level.num_digits
        if table.ordered:
            order = [table.labels.index(label) for label in chart.labels]
            assert order == sorted(order)


def answer_from_table(question: Question, cells: dict[str, int]) -> list[str]:
    """All right answers, read from the description."""
    numbers = sorted(cells.values())
    match question.kind:
        case "num_values":
            return [str(len(cells))]
        case "largest":
            return [name for name, value in cells.items() if value == numbers[-1]]
        case "smallest":
            return [name for name, value in cells.items() if value == numbers[0]]
        case "value":
            return [str(cells[re.sub(r"^What is the value of (.*)\?$", r"\1", question.prompt)])]
        case "which":
            wanted = re.sub(r"^Which has the value (.*)\?$", r"\1", question.prompt)
            return [name for name, value in cells.items() if str(value) == wanted]
        case "compare":
            found = re.fullmatch(r"Has (.*) a larger value than (.*)\?", question.prompt)
            assert found
            return ["yes" if cells[found[1]] > cells[found[2]] else "no"]
        case "difference":
            found = re.fullmatch(r"How much more has (.*) than (.*)\?", question.prompt)
            assert found
            return [str(cells[found[1]] - cells[found[2]])]
    raise AssertionError(question.kind)


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
def test_answers_follow_from_the_table(difficulty: str) -> None:
    task = Charts(difficulty=difficulty, num_questions=20)
    for index in range(80):
        scene = task.draw("test", 0, index)
        named = re.findall(r"(?:: |, )([^,:]+?) ([0-9]+)(?=[,.])", scene.description)
        if "Pie" in scene.description and not named:
            continue  # a pie without numbers names only its slices
        cells = {name: int(value) for name, value in named}
        for question in scene.questions:
            assert answer_from_table(question, cells) == [question.answer], scene.description


def test_what_cannot_be_seen_is_not_asked() -> None:
    chart = replace(CHART, values=(40, 41, 2, 30))
    generator = np.random.default_rng(0)
    assert charts.ask(generator, "largest", chart, 1) is None  # 40 and 41 look alike
    assert charts.ask(generator, "largest", replace(chart, printed=True), 1) is not None
    for _ in range(30):
        question = charts.ask(generator, "value", chart, 1)
        assert question is not None
        assert question.answer != "2"  # 5 % of 2 is a fraction of a pixel
    assert charts.ask(generator, "difference", chart, 1) is None
    assert charts.ask(generator, "value", replace(chart, form="pie"), 1) is None


def test_test_tables_are_new() -> None:
    train, test = load_tables("train"), load_tables("test")
    assert len(train) + len(test) == len(all_tables())
    assert 0.15 < len(test) / len(all_tables()) < 0.3
    assert not {table.key for table in train} & {table.key for table in test}
    seen = {table.values for table in train}
    assert not any(table.values in seen for table in test)
    sources = {table.key.split("/")[0] for table in train}
    assert {table.key.split("/")[0] for table in test} <= sources


def test_tables_are_the_published_ones() -> None:
    by_key = {table.key: table for table in all_tables()}
    barley = by_key["barley/Manchuria/1931"]
    assert dict(zip(barley.labels, barley.values, strict=True))["Waseca"] == 48.86667
    stock = by_key["stocks/MSFT/2000"]
    assert stock.values[:2] == (39.81, 36.35)
    assert by_key["crimea/disease/0"].values[0] == 110
    assert by_key["wheat/wheat/1565"].labels[:2] == ("1565", "1570")
    for table in all_tables():
        assert min(table.values) >= 0
        assert len(set(table.labels)) == len(table.labels) >= 3


def test_the_axis_is_told_where_values_are_read_from_it() -> None:
    table = "Jan 12, Feb 47, Mar 0, Apr 30."
    assert charts.describe(CHART) == f"Bar chart with axis to 50 by 10, Things: {table}"
    assert charts.describe(replace(CHART, printed=True)) == f"Bar chart, Things: {table}"
    assert charts.describe(replace(CHART, form="pie")) == "Pie chart, Things: Jan, Feb, Mar, Apr."


def test_worked_steps_read_up_to_what_is_asked() -> None:
    assert charts.way_to("Feb", CHART) == "axis to 50 by 10: Jan 12, Feb 47"
    assert charts.way_to("Jan", replace(CHART, printed=True)) == "Jan 12"


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
def test_worked_steps_change_no_question(difficulty: str) -> None:
    plain, worked = (
        Charts(difficulty=difficulty, num_questions=20, worked=worked) for worked in (False, True)
    )
    for index in range(40):
        pairs = zip(
            plain.draw("test", 1, index).questions,
            worked.draw("test", 1, index).questions,
            strict=True,
        )
        for one, other in pairs:
            assert replace(other, reasoning=one.reasoning) == one
            assert other.check(other.response())
            if one.kind == "value":
                # The value that was read last is the answer.
                assert other.reasoning is not None
                assert other.reasoning.split()[-1] == one.answer
                label = re.sub(r"^What is the value of (.*)\?$", r"\1", one.prompt)
                assert other.reasoning.endswith(f"{label} {one.answer}")


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
def test_invented_values_are_of_any_size_and_for_training_alone(difficulty: str) -> None:
    plain = Charts(difficulty=difficulty, num_questions=20)
    inventing = Charts(difficulty=difficulty, num_questions=20, invented=1.0)
    for index in range(20):
        one, other = plain.draw("test", 0, index), inventing.draw("test", 0, index)
        assert one.questions == other.questions
        assert one.image is not None
        assert other.image is not None
        assert one.image.tobytes() == other.image.tobytes()
    assert any(
        plain.draw("train", 0, index).description != inventing.draw("train", 0, index).description
        for index in range(5)
    )


def test_drawn_values_fill_their_range() -> None:
    generator = np.random.default_rng(0)
    drawn = [charts.draw_values(generator, 4, 2) for _ in range(2000)]
    assert {len(values) for values in drawn} == {4}
    assert {max(values) for values in drawn} == set(range(10, 100))
    shares = [value / max(values) for values in drawn for value in values]
    assert np.histogram(shares, bins=4, range=(0, 0.9999))[0].min() > 1200
