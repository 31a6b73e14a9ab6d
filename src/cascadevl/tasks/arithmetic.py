"""Worked steps of small calculations, written out as a model should learn to write them.

Kept apart because numbers come from several places: handwriting, charts and plain text.
"""

from __future__ import annotations

from collections.abc import Sequence


def sum_steps(numbers: Sequence[int]) -> str:
    """Add two or more numbers one after the other: ``7 + 5 = 12, 12 + 1 = 13``."""
    total, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{total} + {number} = {total + number}")
        total += number
    return ", ".join(steps)


def addition_steps(left: int, right: int) -> str:
    """Add column by column, ones first: ``27 + 45: 7 + 5 = 12, carry 1, 2 + 4 + 1 = 7``.

    Numbers of one digit each are simply added.
    """
    if left < 10 and right < 10:
        return f"{left} + {right} = {left + right}"
    steps, carry = [], 0
    width = max(len(str(left)), len(str(right)))
    for column in range(width):
        upper, lower = left // 10**column % 10, right // 10**column % 10
        total = upper + lower + carry
        plus = f" + {carry}" if carry else ""
        carry = total // 10
        keep = ", carry 1" if carry and column < width - 1 else ""
        steps.append(f"{upper} + {lower}{plus} = {total}{keep}")
    return f"{left} + {right}: " + ", ".join(steps)


def subtraction_steps(left: int, right: int) -> str:
    """Subtract a number in its parts: ``73 - 45: 73 - 40 = 33, 33 - 5 = 28``."""
    parts = [int(digit) * 10**place for place, digit in enumerate(reversed(str(right)))]
    parts = [part for part in reversed(parts) if part]
    if len(parts) <= 1:
        return f"{left} - {right} = {left - right}"
    steps, rest = [], left
    for part in parts:
        steps.append(f"{rest} - {part} = {rest - part}")
        rest -= part
    return f"{left} - {right}: " + ", ".join(steps)


def multiplication_steps(left: int, right: int) -> str:
    """Multiply tens and ones apart: ``23 * 4: 20 * 4 = 80, 3 * 4 = 12, 80 + 12 = 92``."""
    tens, ones = left // 10 * 10, left % 10
    if not tens or not ones:
        return f"{left} * {right} = {left * right}"
    return (
        f"{left} * {right}: {tens} * {right} = {tens * right}, {ones} * {right} = {ones * right}, "
        f"{tens * right} + {ones * right} = {left * right}"
    )
