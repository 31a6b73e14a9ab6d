from __future__ import annotations

import argparse

import pytest

from cascadevl.cli.arguments import byte_size, increment, positive_int


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("5000000", 5_000_000), ("500MB", 500_000_000), ("1.5gb", 1_500_000_000)],
)
def test_byte_sizes(text: str, size: int):
    assert byte_size(text) == size


@pytest.mark.parametrize(("text", "value"), [("1", 1.0), ("0.25", 0.25), ("1/16", 0.0625)])
def test_increments(text: str, value: float):
    assert increment(text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [(byte_size, "0"), (byte_size, "-1GB"), (increment, "0"), (increment, "2"), (increment, "1/0"),
     (increment, "nan"), (positive_int, "0"), (positive_int, "-3")],
)  # fmt: skip
def test_values_out_of_range_are_refused(kind, text: str):
    with pytest.raises(argparse.ArgumentTypeError):
        kind(text)


@pytest.mark.parametrize(
    ("kind", "text"), [(byte_size, "big"), (increment, "x"), (positive_int, "2.5")]
)
def test_words_are_refused(kind, text: str):
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):
        kind(text)
