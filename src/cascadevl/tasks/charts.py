"""Charts of real tables: reading a value, comparing, finding the largest.

The tables are those of `cascadevl.tasks.tables`; a chart shows some neighbouring or chosen
entries of one, scaled by a power of ten and rounded to two or three digits. Test tables are
never seen in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np

from cascadevl.tasks.base import (
    Metric,
    Question,
    Scene,
    Split,
    check_difficulty,
    pick,
    scene_generator,
)
from cascadevl.tasks.chart_drawing import PALETTE, Chart, Form, labels_fit, render
from cascadevl.tasks.tables import Table, load_tables

FORM_NAMES = {"bar": "Bar chart", "hbar": "Bar chart", "line": "Line chart", "pie": "Pie chart"}

VISIBLE_SHARE = 0.06
"""Where values are not printed, what is compared differs by this share of the axis, and a value
asked for is at least twice as large."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """How much a chart shows.

    Attributes:
        num_values: Fewest and most values.
        num_digits: Digits of the largest value.
        forms: Kinds of charts.
        printed_share: How often the values are printed in the chart.
        font_size: Size of text, as a share of the picture's side.
        longest_label: Most letters of a label.
        title: Whether the table's title is drawn.
    """

    num_values: tuple[int, int]
    num_digits: int = 2
    forms: tuple[Form, ...]
    printed_share: float
    font_size: float
    longest_label: int
    title: bool


LEVELS = {
    "easy": Level(
        num_values=(3, 4),
        forms=("bar",),
        printed_share=1.0,
        font_size=0.10,
        longest_label=4,
        title=False,
    ),
    "axis": Level(
        num_values=(3, 5),
        forms=("bar", "line"),
        printed_share=0.0,
        font_size=0.075,
        longest_label=4,
        title=False,
    ),
    "full": Level(
        num_values=(3, 7),
        num_digits=3,
        forms=("bar", "hbar", "line", "pie"),
        printed_share=0.5,
        font_size=0.055,
        longest_label=15,
        title=True,
    ),
}

PROMPTS = {
    "value": ("What is the value of {}?", "Which value does {} have?"),
    "largest": ("Which has the largest value?", "What stands for the highest value?"),
    "smallest": ("Which has the smallest value?", "What stands for the lowest value?"),
    "num_values": ("How many values are shown?", "Count the values."),
    # Labels may be years, so "larger" must say that the values are meant.
    "compare": ("Has {} a larger value than {}?", "Is the value of {} above that of {}?"),
    "difference": ("How much more has {} than {}?", "By how much is {} above {}?"),
    "which": ("Which has the value {}?", "What stands for the value {}?"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Charts:
    """Charts of real tables.

    Attributes:
        px: Side of the picture. "easy" is readable from 112 px on, the others from 224.
        num_questions: At most so many questions a picture.
        difficulty: A key of ``LEVELS``.
        num_phrasings: How many wordings of each question are used.
        worked: Whether a value or a name that is asked for comes with worked steps: what is read
            on the way to it.
        invented: Share of the charts in training whose values are no table's, so that no value is
            known by heart. Test charts show tables alone.
    """

    px: int = 112
    num_questions: int = 3
    difficulty: str = "easy"
    num_phrasings: int = 1
    worked: bool = False
    invented: float = 0.0
    name: ClassVar[str] = "charts"

    def __post_init__(self) -> None:
        """Refuse an unknown difficulty."""
        check_difficulty(self.name, self.difficulty, LEVELS)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of questions asked at this difficulty."""
        some_printed = LEVELS[self.difficulty].printed_share > 0
        return tuple(
            kind for kind in PROMPTS if some_printed or kind not in ("difference", "which")
        )

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """Draw one chart with its questions."""
        generator = scene_generator(f"{self.name}/{self.difficulty}", split, seed, index)
        level = LEVELS[self.difficulty]
        chart = draw_chart(generator, pick(generator, tables_for(split, level)), level)
        if split == "train" and self.invented > 0 and generator.random() < self.invented:
            values = draw_values(generator, len(chart.values), level.num_digits)
            chart = replace(chart, values=values)
        kinds = self.kinds
        questions: list[Question] = []
        for number in generator.permutation(len(kinds)):
            question = ask(generator, kinds[number], chart, self.num_phrasings, worked=self.worked)
            if question is not None and len(questions) < self.num_questions:
                questions.append(question)
        return Scene(
            scene_id=f"{self.name}/{self.difficulty}/{self.px}px/{split}/{seed}:{index}",
            images=(render(chart, self.px),),
            questions=tuple(questions),
            description=describe(chart),
        )


@lru_cache(maxsize=16)
def tables_for(split: Split, level: Level) -> tuple[Table, ...]:
    """The tables of a part whose labels are short enough."""
    return tuple(
        table
        for table in load_tables(split)
        if max(len(label) for label in table.labels) <= level.longest_label
    )


def draw_chart(generator: np.random.Generator, table: Table, level: Level) -> Chart:
    """Choose what of a table is shown, and how."""
    while True:
        fewest, most = level.num_values
        count = int(generator.integers(fewest, min(most, len(table.values)) + 1))
        chosen = _choose(generator, table, count)
        largest = max(table.values[number] for number in chosen)
        if largest > 0:
            break
    power = math.floor(math.log10(largest)) - level.num_digits + 1
    values = [_scaled(table.values[number], power) for number in chosen]
    chart = Chart(
        form=pick(generator, level.forms),
        title=table.title if level.title else "",
        labels=tuple(table.labels[number] for number in chosen),
        values=tuple(values),
        printed=bool(generator.random() < level.printed_share),
        colour=int(generator.integers(len(PALETTE))),
        font_size=level.font_size,
    )
    if chart.form == "line" and not table.ordered:
        chart = replace(chart, form="bar")
    if chart.form in ("bar", "line") and not labels_fit(chart.labels, chart.font_size):
        chart = replace(chart, form="hbar")
    return chart


def draw_values(generator: np.random.Generator, count: int, num_digits: int) -> tuple[int, ...]:
    """Values of any size, the largest with that many digits."""
    largest = int(generator.integers(10 ** (num_digits - 1), 10**num_digits))
    values: list[int] = generator.integers(0, largest + 1, size=count).tolist()
    values[int(generator.integers(count))] = largest
    return tuple(values)


def _choose(generator: np.random.Generator, table: Table, count: int) -> list[int]:
    """Neighbours in time, or any entries in any order."""
    size = len(table.values)
    if not table.ordered:
        return [int(number) for number in generator.permutation(size)[:count]]
    stride = int(generator.integers(1, max(1, (size - 1) // max(1, count - 1)) + 1))
    first = int(generator.integers(0, size - stride * (count - 1)))
    return list(range(first, first + stride * count, stride))[:count]


def _scaled(value: float, power: int) -> int:
    # Powers of ten as whole numbers: 10.0**-1 is not exact, and 4.5 / 0.1 would round down.
    return round(value / int(10**power) if power >= 0 else value * int(10**-power))


def describe(chart: Chart) -> str:
    """The dense description: axis and table, or only its labels where no value can be read."""
    axis = f" with {_axis(chart)}" if _axis(chart) else ""
    title = f", {chart.title}" if chart.title else ""
    return f"{FORM_NAMES[chart.form]}{axis}{title}: {_cells(chart, len(chart.labels))}."


def way_to(label: str, chart: Chart) -> str:
    """What is read on the way to an entry: the axis, then the entries in order up to this one.

    Args:
        label: Its name.
        chart: The chart.
    """
    axis = f"{_axis(chart)}: " if _axis(chart) else ""
    return axis + _cells(chart, chart.labels.index(label) + 1)


def _axis(chart: Chart) -> str:
    """Where the axis ends and how far its ticks are apart; empty where there is none."""
    if chart.printed or chart.form == "pie":
        return ""
    return f"axis to {chart.axis_end} by {chart.step}"


def _cells(chart: Chart, count: int) -> str:
    readable = chart.printed or chart.form != "pie"
    return ", ".join(
        f"{name} {value}" if readable else name
        for name, value in zip(chart.labels[:count], chart.values[:count], strict=True)
    )


def ask(
    generator: np.random.Generator,
    kind: str,
    chart: Chart,
    num_phrasings: int,
    *,
    worked: bool = False,
) -> Question | None:
    """A question of one kind, or None where the chart does not show the answer clearly."""
    found = _ASKERS[kind](generator, chart)
    if found is None:
        return None
    about, answer, reasoning = found
    if worked and kind in ("value", "which"):
        reasoning = way_to(str(about[0]) if kind == "value" else answer, chart)
    prompt = pick(generator, PROMPTS[kind][:num_phrasings]).format(*about)
    metric: Metric = "relaxed" if kind == "value" else "exact"
    return Question(prompt=prompt, answer=answer, kind=kind, reasoning=reasoning, metric=metric)


Found = tuple[Sequence[object], str, str | None] | None


def _margin(chart: Chart) -> float:
    """By how much two values must differ for the difference to be seen."""
    if chart.printed:
        return 1.0
    return VISIBLE_SHARE * (sum(chart.values) if chart.form == "pie" else chart.axis_end)


def _value(generator: np.random.Generator, chart: Chart) -> Found:
    if chart.form == "pie" and not chart.printed:
        return None
    least = 0.0 if chart.printed else 2 * _margin(chart)
    options = [number for number, value in enumerate(chart.values) if value >= least]
    number = pick(generator, options)
    return (chart.labels[number],), str(chart.values[number]), None


def _extreme(sign: int) -> Callable[[np.random.Generator, Chart], Found]:
    def asker(generator: np.random.Generator, chart: Chart) -> Found:
        order = sorted(range(len(chart.values)), key=lambda number: -sign * chart.values[number])
        first, second = (chart.values[number] for number in order[:2])
        if abs(first - second) < _margin(chart):
            return None
        return (), chart.labels[order[0]], None

    return asker


def _num_values(generator: np.random.Generator, chart: Chart) -> Found:
    return (), str(len(chart.values)), None


def _two(generator: np.random.Generator, chart: Chart) -> tuple[int, int] | None:
    """Two entries that differ visibly, the larger one first."""
    pairs = [
        (left, right)
        for left, upper in enumerate(chart.values)
        for right, lower in enumerate(chart.values)
        if upper - lower >= _margin(chart)
    ]
    return pick(generator, pairs) if pairs else None


def _compare(generator: np.random.Generator, chart: Chart) -> Found:
    pair = _two(generator, chart)
    if pair is None:
        return None
    if generator.integers(2):
        return [chart.labels[number] for number in pair], "yes", None
    return [chart.labels[number] for number in reversed(pair)], "no", None


def _difference(generator: np.random.Generator, chart: Chart) -> Found:
    pair = _two(generator, chart) if chart.printed else None
    if pair is None:
        return None
    upper, lower = (chart.values[number] for number in pair)
    answer = str(upper - lower)
    return [chart.labels[number] for number in pair], answer, f"{upper} - {lower} = {answer}"


def _which(generator: np.random.Generator, chart: Chart) -> Found:
    single = [number for number, v in enumerate(chart.values) if chart.values.count(v) == 1]
    if not chart.printed or not single:
        return None
    number = pick(generator, single)
    return (chart.values[number],), chart.labels[number], None


_ASKERS: dict[str, Callable[[np.random.Generator, Chart], Found]] = {
    "value": _value,
    "largest": _extreme(1),
    "smallest": _extreme(-1),
    "num_values": _num_values,
    "compare": _compare,
    "difference": _difference,
    "which": _which,
}
