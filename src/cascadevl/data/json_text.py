"""JSON as people write it: decoded, or explained.

A trailing comma or a single quote is the usual reason why a meta file or a line does not load
(a released example file has one), so the slip is called by its name and place.
"""

from __future__ import annotations

import json
import re

from cascadevl.errors import DataError


def decode_json(content: bytes, *, source: str) -> object:
    """Decode one JSON value, saying in plain words where and how it is broken.

    Args:
        content: UTF-8 text, with or without a byte order mark.
        source: Where it came from, named in errors.

    Raises:
        DataError: Of kind ``invalid_json``.
    """
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} (0x{content[error.start]:02x}) is not UTF-8"
        remedy = "save the file as UTF-8"
    except json.JSONDecodeError as error:
        problem, remedy = _explain(error)
    except (ValueError, RecursionError) as error:  # endless digits, endless nesting
        problem, remedy = f"the JSON cannot be read ({error})", "repair or remove it"
    raise DataError(problem, kind="invalid_json", source=source, remedy=remedy)


def _explain(error: json.JSONDecodeError) -> tuple[str, str]:
    """Problem and remedy of broken JSON; people's usual slips are called by their names."""
    text, place = error.doc, error.pos
    remedy = "repair or remove it"
    if not text.strip():
        return "the JSON is empty", "write an object, or remove the file"
    for comma in re.finditer(r",\s*[}\]]", text):
        if comma.start() <= place <= comma.end():
            place, end = comma.start(), comma.group()[-1]
            where = _line_column(text, place)
            return f"not valid JSON at {where}: a comma before the closing {end!r}", "remove it"
    if text[place : place + 1] == "'":
        remedy = "use double quotes"
    elif error.msg.startswith("Extra data"):
        remedy = "write one object a line"
    elif text.lstrip().startswith("["):
        remedy = "write one object a line, not a list of objects"
    return f"not valid JSON at {_line_column(text, place)}: {error.msg}", remedy


def _line_column(text: str, place: int) -> str:
    column = f"column {place - text.rfind(chr(10), 0, place)}"
    return f"line {text.count(chr(10), 0, place) + 1} {column}" if "\n" in text else column
