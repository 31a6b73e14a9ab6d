"""Worked steps: every equation in them is true, and the last leads to the answer."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadevl.tasks.arithmetic import (
    addition_steps,
    multiplication_steps,
    subtraction_steps,
    sum_steps,
)

NUMBERS = st.integers(0, 9999)
EQUATION = re.compile(r"([0-9]+(?: [-+*] [0-9]+)+) = ([0-9]+)")


def check_equations(steps: str) -> list[int]:
    """All right-hand sides, after checking them with Python's own arithmetic."""
    results = []
    for left, right in EQUATION.findall(steps):
        assert eval(left) == int(right), steps
        results.append(int(right))
    assert results
    return results


@given(NUMBERS, NUMBERS)
def test_addition_by_columns(left: int, right: int) -> None:
    steps = addition_steps(left, right)
    sums = check_equations(steps)
    if left < 10 and right < 10:
        assert sums == [left + right]
        return
    # The ones of each column's sum, then all of the last one's, spell the answer.
    digits = "".join(str(total % 10) for total in reversed(sums[:-1]))
    assert f"{sums[-1]}{digits}" == str(left + right)
    assert steps.count("carry") == sum(total > 9 for total in sums[:-1])


@given(NUMBERS, NUMBERS)
def test_subtraction_in_parts(left: int, right: int) -> None:
    left, right = max(left, right), min(left, right)
    assert check_equations(subtraction_steps(left, right))[-1] == left - right


@given(st.integers(0, 99), st.integers(0, 9))
def test_multiplication_in_parts(left: int, right: int) -> None:
    assert check_equations(multiplication_steps(left, right))[-1] == left * right


@given(st.lists(st.integers(0, 9), min_size=2, max_size=6))
def test_sums(numbers: list[int]) -> None:
    assert check_equations(sum_steps(numbers))[-1] == sum(numbers)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (addition_steps(27, 45), "27 + 45: 7 + 5 = 12, carry 1, 2 + 4 + 1 = 7"),
        (addition_steps(58, 67), "58 + 67: 8 + 7 = 15, carry 1, 5 + 6 + 1 = 12"),
        (addition_steps(9, 68), "9 + 68: 9 + 8 = 17, carry 1, 0 + 6 + 1 = 7"),
        (subtraction_steps(73, 45), "73 - 45: 73 - 40 = 33, 33 - 5 = 28"),
        (subtraction_steps(73, 40), "73 - 40 = 33"),
        (subtraction_steps(73, 0), "73 - 0 = 73"),
        (multiplication_steps(23, 4), "23 * 4: 20 * 4 = 80, 3 * 4 = 12, 80 + 12 = 92"),
        (multiplication_steps(20, 4), "20 * 4 = 80"),
        (sum_steps([7, 5, 1]), "7 + 5 = 12, 12 + 1 = 13"),
    ],
)
def test_written_form(steps: str, expected: str) -> None:
    assert steps == expected
