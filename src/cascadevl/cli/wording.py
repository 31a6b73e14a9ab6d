"""How errors are worded in a terminal."""

from __future__ import annotations

from cascadevl.errors import CascadeVLError, DataError


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
