"""Real tables for charts: the data sets that come with vega-datasets, cut into small tables.

Each table is one row of numbers with their labels and a title, for example the barley yield of
one variety in one year at six sites. Whole slices (varieties, years, origins, decades) are held
out, so a test table shares no value series with any training table. The files are read as text
and not through pandas, whose reading of dates and types differs between versions.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Any, TypeAlias, TypeVar

from cascadevl.tasks.base import Split

MONTHS = (
    *("Jan", "Feb", "Mar", "Apr", "May", "Jun"),
    *("Jul", "Aug", "Sep", "Oct", "Nov", "Dec"),
)
Row: TypeAlias = dict[str, Any]
Rows: TypeAlias = list[Row]
Reader: TypeAlias = Callable[[str], Rows]
Key = TypeVar("Key", bound=Hashable)

_SECTORS = {
    "mining_and_logging": "mining",
    "construction": "building",
    "manufacturing": "industry",
    "wholesale_trade": "wholesale",
    "retail_trade": "retail",
    "transportation_and_warehousing": "transport",
    "utilities": "utilities",
    "information": "information",
    "financial_activities": "finance",
    "education_and_health_services": "health",
    "leisure_and_hospitality": "leisure",
    "government": "government",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One series of real numbers.

    Attributes:
        key: Identity, ``source/slice``.
        title: What it shows.
        labels: Name of each value.
        values: The values as published, none negative.
        ordered: Whether the labels follow in time, so that a line may join them.
        held_out: Whether it belongs to the test part.
    """

    key: str
    title: str
    labels: tuple[str, ...]
    values: tuple[float, ...]
    ordered: bool
    held_out: bool


@lru_cache(maxsize=2)
def load_tables(split: Split) -> tuple[Table, ...]:
    """All tables of the training or the test part, by key."""
    return tuple(table for table in all_tables() if table.held_out == (split == "test"))


@lru_cache(maxsize=1)
def all_tables() -> tuple[Table, ...]:
    """All tables, by key."""
    tables = (table for cut in _CUTS for table in cut(read_rows))
    return tuple(sorted(tables, key=lambda table: table.key))


def read_rows(name: str) -> Rows:
    """The rows of one data set of vega-datasets, numbers in CSV files still as text."""
    from vega_datasets import local_data  # a second to import: only where charts are drawn

    text = getattr(local_data, name).raw().decode("utf-8-sig")
    if text.lstrip().startswith("["):
        rows: Rows = json.loads(text)
        return rows
    return list(csv.DictReader(io.StringIO(text)))


def _grouped(rows: Rows, key: Callable[[Row], Key]) -> list[tuple[Key, Rows]]:
    groups: defaultdict[Key, Rows] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return list(groups.items())


def _mean(rows: Rows, column: str) -> float:
    """Mean of the values that are there."""
    return fmean(float(row[column]) for row in rows if row[column] not in (None, ""))


def _year(date: str) -> str:
    return date[:4]


def _month(date: str) -> str:
    return MONTHS[int(date[5:7]) - 1]


def _table(
    key: str,
    title: str,
    pairs: Iterable[tuple[object, Any]],
    *,
    ordered: bool,
    held_out: bool,
) -> Table:
    cells = [(str(label), float(value)) for label, value in pairs]
    return Table(
        key=key,
        title=title,
        labels=tuple(label for label, _ in cells),
        values=tuple(value for _, value in cells),
        ordered=ordered,
        held_out=held_out,
    )


def _counted(rows: Rows, column: str) -> list[tuple[str, int]]:
    return sorted(Counter(row[column] for row in rows if row[column]).items())


def _barley(read: Reader) -> Iterator[Table]:
    for (variety, year), rows in _grouped(
        read("barley"), lambda row: (row["variety"], row["year"])
    ):
        yield _table(
            f"barley/{variety}/{year}",
            f"Barley yield, {variety} {year}",
            ((row["site"], row["yield"]) for row in rows),
            ordered=False,
            held_out=variety in ("Trebi", "Velvet"),
        )


def _cars(read: Reader) -> Iterator[Table]:
    measures = {
        "Miles_per_Gallon": "Miles a gallon",
        "Horsepower": "Horsepower",
        "Weight_in_lbs": "Weight",
        "Displacement": "Displacement",
        "Acceleration": "Acceleration",
    }
    for origin, rows in _grouped(read("cars"), lambda row: row["Origin"]):
        years = _grouped(rows, lambda row: _year(row["Year"]))
        for column, name in measures.items():
            yield _table(
                f"cars/{origin}/{column}",
                f"{name}, cars from {origin}",
                ((year, _mean(part, column)) for year, part in years),
                ordered=True,
                held_out=origin == "Japan",
            )


def _crimea(read: Reader) -> Iterator[Table]:
    rows = read("crimea")
    for first in (0, 12):
        for cause in ("wounds", "other", "disease"):
            yield _table(
                f"crimea/{cause}/{first}",
                f"Deaths in the Crimea, {cause}",
                ((_month(row["date"]), row[cause]) for row in rows[first : first + 12]),
                ordered=True,
                held_out=cause == "other",
            )


def _driving(read: Reader) -> Iterator[Table]:
    rows = read("driving")
    for first in range(0, 55, 11):
        part = rows[first : first + 11]
        for column, name in (("miles", "Miles driven a head"), ("gas", "Price of gas")):
            yield _table(
                f"driving/{column}/{part[0]['year']}",
                name,
                ((row["year"], row[column]) for row in part),
                ordered=True,
                held_out=first == 22,
            )


def _iowa(read: Reader) -> Iterator[Table]:
    for source, rows in _grouped(read("iowa_electricity"), lambda row: row["source"]):
        yield _table(
            f"iowa/{source}",
            f"Electricity in Iowa, {source}",
            ((_year(row["year"]), row["net_generation"]) for row in rows),
            ordered=True,
            held_out=source == "Nuclear Energy",
        )


def _iris(read: Reader) -> Iterator[Table]:
    names = {
        "sepalLength": "sepal length",
        "sepalWidth": "sepal width",
        "petalLength": "petal length",
        "petalWidth": "petal width",
    }
    for species, rows in _grouped(read("iris"), lambda row: row["species"]):
        yield _table(
            f"iris/{species}",
            f"Iris {species}",
            [(name, _mean(rows, column)) for column, name in names.items()],
            ordered=False,
            held_out=species == "virginica",
        )


def _riots(read: Reader) -> Iterator[Table]:
    yield _table(
        "riots/race",
        "Deaths, Los Angeles 1992",
        _counted(read("la_riots"), "race"),
        ordered=False,
        held_out=False,
    )


def _weather(read: Reader) -> Iterator[Table]:
    names = {"precipitation": "Rain", "temp_max": "Highest temperature", "wind": "Wind"}
    for year, rows in _grouped(read("seattle_weather"), lambda row: _year(row["date"])):
        months = _grouped(rows, lambda row: _month(row["date"]))
        for column, name in names.items():
            yield _table(
                f"weather/{column}/{year}",
                f"{name}, Seattle {year}",
                ((month, _mean(part, column)) for month, part in months),
                ordered=True,
                held_out=year == "2014",
            )
        yield _table(
            f"weather/days/{year}",
            f"Days of weather, Seattle {year}",
            _counted(rows, "weather"),
            ordered=False,
            held_out=year == "2014",
        )


def _temperatures(read: Reader) -> Iterator[Table]:
    for town, name in (("Seattle", "seattle_temps"), ("San Francisco", "sf_temps")):
        months = _grouped(read(name), lambda row: _month(row["date"]))
        yield _table(
            f"temperature/{town}",
            f"Temperature, {town}",
            [(month, _mean(rows, "temp")) for month, rows in months],
            ordered=True,
            held_out=False,
        )


def _stocks(read: Reader) -> Iterator[Table]:
    # Dates read "Jan 1 2000" here.
    for (symbol, year), rows in _grouped(
        read("stocks"), lambda row: (row["symbol"], row["date"].split()[2])
    ):
        if len(rows) == len(MONTHS):
            yield _table(
                f"stocks/{symbol}/{year}",
                f"Share price, {symbol} {year}",
                ((row["date"].split()[0], row["price"]) for row in rows),
                ordered=True,
                held_out=year in ("2003", "2008"),
            )


def _employment(read: Reader) -> Iterator[Table]:
    for year, rows in _grouped(read("us_employment"), lambda row: _year(row["month"])):
        yield _table(
            f"employment/{year}",
            f"Jobs in the USA, {year}",
            [(name, _mean(rows, column)) for column, name in _SECTORS.items()],
            ordered=False,
            held_out=year in ("2009", "2014"),
        )


def _wheat(read: Reader) -> Iterator[Table]:
    rows = read("wheat")
    for first in range(0, 50, 10):
        part = rows[first : first + 10]
        for column, name in (("wheat", "Price of wheat"), ("wages", "Weekly wages")):
            yield _table(
                f"wheat/{column}/{part[0]['year']}",
                name,
                ((row["year"], row[column]) for row in part),
                ordered=True,
                held_out=first == 20,
            )


def _airports(read: Reader) -> Iterator[Table]:
    counts = [(state, count) for state, count in _counted(read("airports"), "state")]
    states = [(state, count) for state, count in counts if len(state) == 2 and state != "NA"]
    for number in range(5):
        yield _table(
            f"airports/{number}",
            "Airports by state",
            states[number::5],
            ordered=False,
            held_out=number == 2,
        )


_CUTS: tuple[Callable[[Reader], Iterator[Table]], ...] = (
    _airports,
    _barley,
    _cars,
    _crimea,
    _driving,
    _employment,
    _iowa,
    _iris,
    _riots,
    _stocks,
    _temperatures,
    _weather,
    _wheat,
)
