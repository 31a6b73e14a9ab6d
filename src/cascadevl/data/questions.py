"""A file of questions to be answered: one conversation a line, in the released form or OpenAI's.

Training data may be given as they are: the answer at the end of a conversation is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, TypeGuard

from cascadevl.data.chat import to_messages
from cascadevl.data.image import reject_url
from cascadevl.data.json_text import decode_json
from cascadevl.data.parsing import parse_record
from cascadevl.errors import DataError
from cascadevl.types import ImageRef, Message, Part, VideoRef

RecordId: TypeAlias = str | int

_TURNS = {"conversations": "from", "messages": "role"}
_ANSWERERS = ("gpt", "assistant")
_MEDIA = ("image", "images", "video", "videos")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file that is not blank.

    Attributes:
        number: Its number, from 1.
        content: What stands in it.
    """

    number: int
    content: bytes


def read_lines(file: Path) -> Iterator[Line]:
    """The lines of a file, those left out that are blank.

    Raises:
        DataError: Of kind ``missing_file``, if it cannot be read.
    """
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if content := line.strip():
                    yield Line(number, content)
    except OSError as error:
        raise DataError(
            f"the file cannot be read ({error})",
            kind="missing_file",
            source=str(file),
            remedy="check the path",
        ) from error


def parse_question(
    line: Line, *, file: Path, root: Path | None = None
) -> tuple[RecordId, tuple[Message, ...]]:
    """The id of a line, and the conversation that is to be answered.

    A line holds ``{"id": ..., "conversations": [...]}`` in the released form, pictures beside it
    (``parse_record``); or ``{"id": ..., "messages": [...]}``, pictures within it as OpenAI or
    transformers write them (``to_messages``) or beside it. The number of the line is the id of
    one that has none.

    Args:
        line: The line.
        file: Where it stands, for errors.
        root: Folder that relative paths start from; None takes paths as they are.

    Raises:
        DataError: If it cannot be used.
    """
    source = f"{file}:{line.number}"
    fields = decode_json(line.content, source=source)
    if not isinstance(fields, Mapping):
        raise DataError(
            "the line is no object",
            kind="bad_field",
            source=source,
            remedy='write {"id": ..., "messages": [...]}',
        )
    asked = _without_answer(fields)
    beside = any(asked.get(name) for name in _MEDIA)
    messages = asked.get("messages")
    if asked.get("conversations") or beside or not _is_list(messages):
        shown = parse_record(asked, source=source, root=root, answered=False).messages
    else:
        shown = _openai(messages, source, root)
    return record_id(fields, line), shown


def record_id(fields: object, line: Line) -> RecordId:
    """The id that a decoded line gives itself, or the number of the line."""
    own = fields.get("id") if isinstance(fields, Mapping) else None
    return own if isinstance(own, str | int) else line.number


def _without_answer(fields: Mapping[str, object]) -> dict[str, object]:
    """The same without an answer at the end."""
    result = dict(fields)
    for name, who in _TURNS.items():
        turns = result.get(name)
        last = turns[-1] if _is_list(turns) and turns else None
        if _is_list(turns) and isinstance(last, Mapping) and last.get(who) in _ANSWERERS:
            result[name] = turns[:-1]
    return result


def _openai(turns: Sequence[object], source: str, root: Path | None) -> tuple[Message, ...]:
    try:
        messages = to_messages(turns)
    except DataError as error:
        raise error.at(source, "messages") from error
    if not messages or messages[-1].role not in ("user", "tool"):
        raise DataError(
            f"the conversation ends with a turn of {messages[-1].role}"
            if messages
            else "the conversation is empty",
            kind="bad_turns",
            source=source,
            field="messages",
            remedy="end it with a turn of user, which is to be answered",
        )
    return tuple(
        replace(message, parts=tuple(_from(root, part, source) for part in message.parts))
        for message in messages
    )


def _from(root: Path | None, part: Part, source: str) -> Part:
    """A picture or video with the folder its relative path starts from."""
    if isinstance(part, str) or not isinstance(part.source, Path):
        return part
    reject_url(str(part.source), source=source, field="messages")
    if root is None:
        return part
    if isinstance(part, VideoRef):
        return replace(part, source=root / part.source)
    return ImageRef(root / part.source)


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
