"""What the type of a configuration field says: sections, lists of sections, plain values.

jsonargparse converts and checks plain values; sections (dataclasses) are walked by our own code
so that an error can name the key, the file and what was meant.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser


def hints_of(cls: Any) -> dict[str, Any]:
    """The type of every field of a dataclass that its constructor takes, in order."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


def dotted_keys(cls: Any, path: str = "") -> Iterator[str]:
    """All dotted keys below a dataclass, in order."""
    for name, hint in hints_of(cls).items():
        section = section_of(hint)
        key = f"{path}.{name}" if path else name
        if section is None:
            yield key
        else:
            yield from dotted_keys(section, key)


def section_of(hint: Any) -> Any:
    """The dataclass a field holds, optional or not; None if it holds none."""
    found = [option for option in _options(hint) if is_dataclass(option)]
    if len(found) > 1:
        raise TypeError(f"a field may hold one kind of section, not {described(hint)}")
    return found[0] if found else None


def section_list_of(hint: Any) -> tuple[Any, Any] | None:
    """``(list or tuple, type of an item)`` if a field holds a sequence of dataclasses."""
    for option in _options(hint):
        arguments = get_args(option)
        if get_origin(option) in (list, tuple, Sequence) and section_of(arguments[0]) is not None:
            return (list if get_origin(option) is list else tuple), arguments[0]
    return None


def values_of(hint: Any) -> Any:
    """The type of the values, if a field holds a dictionary with string keys."""
    for option in _options(hint):
        if get_origin(option) in (dict, Mapping) and get_args(option)[0] is str:
            return get_args(option)[1]
    return None


def allows(hint: Any, kind: type) -> bool:
    """Whether a type is ``kind`` or a union with it (or anything at all)."""
    return any(option in (kind, Any) for option in _options(hint))


def holds_text(hint: Any) -> bool:
    """Whether a type is nothing but text or a path, optional or not."""
    return all(option in (str, Path, type(None)) for option in _options(hint))


def converted(hint: Any, value: Any) -> Any:
    """A plain value as its field wants it: 1 as 1.0, a list as a tuple, text as a path.

    Raises:
        ValueError: If it is of another type.
    """
    try:
        return _parser(hint).parse_object({"value": copy.deepcopy(value)})["value"]
    except (ArgumentError, TypeError) as error:
        raise ValueError(str(error)) from error


@functools.cache
def _parser(hint: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def described(hint: Any) -> str:
    """A type in words for an error: ``float or 'random'``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(repr(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(described(option) for option in arguments)
    if origin is not None:
        inner = ("..." if item is Ellipsis else described(item) for item in arguments)
        return f"{origin.__name__}[{', '.join(inner)}]"
    if is_dataclass(hint):
        return f"a section with the keys {', '.join(hints_of(hint))}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(repr(member.name) for member in hint)
    return "null" if hint is type(None) else str(getattr(hint, "__name__", hint))
