"""How errors are worded in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cascadevl.errors import CascadeVLError, DataError

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = 20


def worded(error: CascadeVLError | OSError) -> str:
    """The message of an error, without Python's decoration and without saying a file name twice.

    Args:
        error: What went wrong.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, DataError) and error.source and repr(error.source) in error.problem:
        return f"{error.problem}; {error.remedy}" if error.remedy else error.problem
    return str(error)


def print_failures(failures: Sequence[CascadeVLError | str], console: Console) -> None:
    """Print the first of many errors, and how many more there are.

    Args:
        failures: The errors, or their words.
        console: Where to print.
    """
    for failure in failures[:_SHOWN]:
        text = failure if isinstance(failure, str) else worded(failure)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if len(failures) > _SHOWN:
        console.print(f"... and {len(failures) - _SHOWN} more", highlight=False)
