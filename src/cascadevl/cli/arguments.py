"""Argument types that several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    Subparsers: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Subparsers = argparse._SubParsersAction


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def byte_size(text: str) -> int:
    """A number of bytes, as ``5000000``, ``500MB`` or ``5GB`` (powers of 1000)."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, factor = text.upper(), 1
    for unit, size in units.items():
        if number.endswith(unit):
            number, factor = number.removesuffix(unit), size
    value = int(float(number) * factor)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of bytes")
    return value


def increment(text: str) -> float:
    """A V2PE increment: a number above 0 and up to 1, also as a fraction like ``1/16``."""
    numerator, _, denominator = text.partition("/")
    divisor = float(denominator or 1)
    value = float(numerator) / divisor if divisor else 0.0
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value
