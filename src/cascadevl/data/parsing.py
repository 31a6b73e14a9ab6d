"""One JSON object of a data set to one `Record`: the released chat format, checked field by field.

The public format is loose and its readers forgive in silence; here every departure is a
`DataError` that names the field. Two spellings are read: ``conversations`` with ``from`` and
``value`` (InternVL, LLaVA), and ``messages`` with ``role`` and ``content`` (ms-swift,
LLaMA-Factory, TRL). Boxes (``<ref>cat</ref><box>[[x1, y1, x2, y2]]</box>``) are text like any
other and are kept as they stand.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from cascadevl.data.image import reject_url
from cascadevl.errors import DataError
from cascadevl.types import ImageRef, Message, Part, Record, Role, VideoRef

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"

ROLES: dict[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "function": "tool",
    "pretrain": "pretrain",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""Names of the released format, and of the newer one, to ours."""

_MARK = re.compile(f"({IMAGE_MARK}|{VIDEO_MARK})")
_TYPE_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class _Turn:
    """A turn with its text still in one piece, and the field the text came from."""

    role: Role
    text: str
    field: str


def parse_record(
    fields: object,
    *,
    source: str,
    root: Path | None = None,
    position: str = "",
    dataset: str = "",
    max_tiles: int | None = None,
    augment: bool = False,
    answered: bool = True,
) -> Record:
    """Check one record and turn it into messages; its pictures are not opened.

    The number of ``<image>`` marks in all human turns must equal the number of pictures. Where
    there is no mark at all, the pictures are put in front of the first human turn. (The released
    code means the same, but looks for the word ``system`` in the text instead of the role, so
    that with a system turn its pictures land in the system prompt.) Videos follow the same rule
    with ``<video>``; a record shows pictures or one video.

    Args:
        fields: The decoded JSON object.
        source: Where it stands, ``file:line``.
        root: Folder that relative paths start from; None takes paths as they are.
        position: Where it stands within its data set; begins the record's identity.
        dataset: Name of the data set.
        max_tiles: The data set's own limit of tiles.
        augment: Whether pictures are degraded in training.
        answered: Whether it ends with an answer; False for one that waits for it.

    Raises:
        DataError: Of kind ``bad_field``, ``bad_role``, ``bad_turns``, ``image_count``,
            ``video_count`` or ``unsupported_source``.
    """
    if not isinstance(fields, Mapping):
        raise DataError(
            f"the record is {_type_name(fields)}, not an object",
            kind="bad_field",
            source=source,
            remedy='write {"conversations": [...]}',
        )
    turns = _turns(fields, source)
    _check_order(turns, source, answered)
    images = _images(fields, root, source)
    videos = _videos(fields, root, source)
    if images and videos:
        raise DataError(
            f"the record has {counted(len(images), 'image')} and a video",
            kind="bad_field",
            source=source,
            field="video",
            remedy="a record shows images or one video; make two of it",
        )
    turns = _with_marks(turns, IMAGE_MARK, images, "image", source)
    turns = _with_marks(turns, VIDEO_MARK, videos, "video", source)
    return Record(
        source=source,
        record_id=_record_id(fields.get("id"), position, source),
        messages=_messages(turns, images or videos),
        dataset=dataset,
        max_tiles=max_tiles,
        augment=augment,
    )


def _turns(fields: Mapping[str, object], source: str) -> list[_Turn]:
    names = [name for name in ("conversations", "messages") if not _is_absent(fields.get(name))]
    if len(names) != 1:
        problem = "has both 'conversations' and 'messages'" if names else "has no conversation"
        raise DataError(
            f"the record {problem}",
            kind="bad_field",
            source=source,
            field="conversations",
            remedy='give {"conversations": [{"from": "human", "value": ...}, ...]}',
        )
    name, turns = names[0], fields[names[0]]
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes):
        raise _wrong_type(turns, "a list of turns", source, name)
    who, what = ("from", "value") if name == "conversations" else ("role", "content")
    return [_turn(turn, f"{name}[{place}]", who, what, source) for place, turn in enumerate(turns)]


def _turn(turn: object, field: str, who: str, what: str, source: str) -> _Turn:
    if not isinstance(turn, Mapping):
        raise _wrong_type(turn, f"an object with {who!r} and {what!r}", source, field)
    role = turn.get(who)
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(
            f"the role is {reprlib.repr(role)}" if who in turn else "the role is missing",
            kind="bad_role",
            source=source,
            field=f"{field}.{who}",
            remedy=f"use one of {', '.join(ROLES)}",
        )
    text = _text(turn.get(what), source, f"{field}.{what}", lists=what == "content")
    if ROLES[role] in ("assistant", "pretrain") and not text.strip():
        raise DataError(
            f"the turn of {role!r} is empty",
            kind="bad_field",
            source=source,
            field=f"{field}.{what}",
            remedy="write what is to be learned, or remove the record",
        )
    return _Turn(ROLES[role], text, f"{field}.{what}")


def _text(value: object, source: str, field: str, *, lists: bool = False) -> str:
    """Text, or a list of ``{"type": "text" | "image" | "video"}`` written as text with marks."""
    if lists and isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return "".join(_piece(piece, source, f"{field}[{n}]") for n, piece in enumerate(value))
    if not isinstance(value, str):
        raise _wrong_type(value, "text", source, field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} is half of a surrogate pair, which is no character",
            kind="bad_field",
            source=source,
            field=field,
            remedy="write the text again as UTF-8",
        ) from error
    return value


def _piece(piece: object, source: str, field: str) -> str:
    if not isinstance(piece, Mapping):
        raise _wrong_type(piece, 'an object with "type"', source, field)
    kind = piece.get("type")
    if kind == "text":
        return _text(piece.get("text"), source, f"{field}.text")
    if kind in ("image", "video"):
        return IMAGE_MARK if kind == "image" else VIDEO_MARK
    raise DataError(
        f"the type is {reprlib.repr(kind)}",
        kind="bad_field",
        source=source,
        field=f"{field}.type",
        remedy="use text, image or video",
    )


def _check_order(turns: Sequence[_Turn], source: str, answered: bool) -> None:
    """[system] human gpt, then human or function and gpt in turn; or exactly one pretrain."""
    if answered and [turn.role for turn in turns] == ["pretrain"]:
        return
    allowed: tuple[Role, ...] = ("system", "user")
    for turn in turns:
        if turn.role not in allowed:
            names = " or ".join(_released_name(role) for role in allowed)
            raise DataError(
                f"a turn of {_released_name(turn.role)} stands where {names} is expected",
                kind="bad_turns",
                source=source,
                field=turn.field.rpartition(".")[0],
                remedy="a conversation reads [system] human gpt human gpt ..., function may take "
                "the place of a later human; a pretrain turn stands alone",
            )
        allowed = _FOLLOWERS[turn.role]
    if (turns[-1].role == "assistant") != answered or turns[-1].role == "system":
        raise DataError(
            f"the conversation ends with a turn of {_released_name(turns[-1].role)}",
            kind="bad_turns",
            source=source,
            field=turns[-1].field.rpartition(".")[0],
            remedy="end it with the answer of gpt; without one there is nothing to learn"
            if answered
            else "end it with a turn of human, which is to be answered",
        )


_FOLLOWERS: dict[Role, tuple[Role, ...]] = {
    "system": ("user",),
    "user": ("assistant",),
    "tool": ("tool", "assistant"),
    "assistant": ("user", "tool"),
}


def _released_name(role: Role) -> str:
    return next(name for name, own in ROLES.items() if own == role)


def _images(fields: Mapping[str, object], root: Path | None, source: str) -> list[Part]:
    found = _media(fields, ("image", "images"), source)
    return [_image_ref(value, root, source, field) for field, value in found]


def _image_ref(value: object, root: Path | None, source: str, field: str) -> ImageRef:
    if isinstance(value, PIL.Image.Image | bytes):
        return ImageRef(value)
    if isinstance(value, Mapping):  # how `datasets` and ms-swift store a picture undecoded
        content = value.get("bytes")
        return _image_ref(content if content else value.get("path"), root, source, field)
    return ImageRef(_path(value, root, source, field))


def _path(value: object, root: Path | None, source: str, field: str) -> Path:
    path = _text(value, source, field)
    reject_url(path, source=source, field=field)
    if not path.strip():
        raise DataError(
            "the path is empty",
            kind="bad_field",
            source=source,
            field=field,
            remedy="give a path, or remove the field",
        )
    return Path(path) if root is None else root / path


def _videos(fields: Mapping[str, object], root: Path | None, source: str) -> list[Part]:
    found = _media(fields, ("video", "videos"), source)
    if len(found) > 1:
        raise DataError(
            f"the record has {len(found)} videos",
            kind="video_count",
            source=source,
            field=found[1][0],
            remedy="a record shows one video; make several of it",
        )
    clip_s = _clip(fields.get("clip"), source) if found else None
    return [
        VideoRef(source=_path(value, root, source, field), clip_s=clip_s) for field, value in found
    ]


def _clip(value: object, source: str) -> tuple[float, float] | None:
    if value is None:
        return None
    if isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) == 2:
        start, end = value
        if _is_second(start) and _is_second(end) and start < end:
            return float(start), float(end)
    raise DataError(
        f"the clip is {reprlib.repr(value)}",
        kind="bad_clip",
        source=source,
        field="clip",
        remedy="give [start, end] in seconds, 0 <= start < end",
    )


def _is_second(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= 1e9 and math.isfinite(value)


def _media(
    fields: Mapping[str, object], names: tuple[str, str], source: str
) -> list[tuple[str, object]]:
    """The values of an image or video field, each with its own field name."""
    given = [name for name in names if not _is_absent(fields.get(name))]
    if len(given) > 1:
        raise DataError(
            f"the record has both {names[0]!r} and {names[1]!r}",
            kind="bad_field",
            source=source,
            field=names[1],
            remedy="keep one of them",
        )
    if not given:
        return []
    value = fields[given[0]]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [(f"{given[0]}[{place}]", each) for place, each in enumerate(value)]
    return [(given[0], value)]


def _with_marks(
    turns: list[_Turn], mark: str, media: Sequence[Part], noun: str, source: str
) -> list[_Turn]:
    """The turns with as many marks as there are pictures, put in front where there were none."""
    places = [n for n, turn in enumerate(turns) if turn.role in ("user", "pretrain")]
    num_marks = sum(turns[place].text.count(mark) for place in places)
    first = turns[places[0]]
    if num_marks == 0 and media:
        marked = _Turn(first.role, f"{mark}\n" * len(media) + first.text, first.field)
        return [*turns[: places[0]], marked, *turns[places[0] + 1 :]]
    if num_marks != len(media):
        raise DataError(
            f"{counted(num_marks, f'{mark} mark')} in the human turns but "
            f"{counted(len(media), noun)} in the record",
            kind=f"{noun}_count",
            source=source,
            field=first.field,
            remedy=f"write one {mark} for each {noun}, or none to put them all in front",
        )
    return turns


def _messages(turns: Sequence[_Turn], media: Sequence[Part]) -> tuple[Message, ...]:
    remaining = iter(media)
    messages = []
    for turn in turns:
        pieces: list[Part] = [turn.text]
        if turn.role in ("user", "pretrain"):
            pieces = [
                next(remaining) if piece in (IMAGE_MARK, VIDEO_MARK) else piece
                for piece in _MARK.split(turn.text)
            ]
        messages.append(Message(turn.role, tuple(piece for piece in pieces if piece != "")))
    return tuple(messages)


def _record_id(value: object, position: str, source: str) -> str:
    """The place within the data set first: ids in the wild repeat, places do not."""
    own = f"{value}" if isinstance(value, str | int) else ""
    own = own.encode(errors="backslashreplace").decode()  # it is hashed as UTF-8 later
    return ":".join(part for part in (position, own) if part) or source


def counted(number: int, noun: str) -> str:
    """A number with its noun, for errors.

    Args:
        number: How many.
        noun: In the singular.
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _is_absent(value: object) -> bool:
    return value is None or (isinstance(value, str | list | tuple) and len(value) == 0)


def _wrong_type(value: object, expected: str, source: str, field: str) -> DataError:
    return DataError(
        "is missing" if value is None else f"is {_type_name(value)}",
        kind="bad_field",
        source=source,
        field=field,
        remedy=f"give {expected}",
    )


def _type_name(value: object) -> str:
    if value is None:
        return "null"
    return _TYPE_NAMES.get(type(value), f"a value of type {type(value).__name__}")
