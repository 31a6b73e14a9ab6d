"""One JSON object of a data set to one `Record`: the released formats, checked field by field.

The public format is loose and its readers forgive in silence; here every departure is a
`DataError` that names the field. Two spellings are read: ``conversations`` with ``from`` and
``value`` (InternVL, LLaVA), and ``messages`` with ``role`` and ``content`` (ms-swift,
LLaMA-Factory, TRL). Preference pairs are read as MMPR has them: ``question``, ``chosen`` and
``rejected``. Boxes (``<ref>cat</ref><box>[[x1, y1, x2, y2]]</box>``) are text like any other and
are kept as they stand.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cascadevl.data.field_values import (
    answer_of,
    counted,
    is_absent,
    text_of,
    type_name,
    wrong_type,
)
from cascadevl.data.media_fields import images_of, videos_of
from cascadevl.errors import DataError
from cascadevl.types import Message, Part, Record, Role

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

PAIR_FIELDS = ("system_prompt", "question", "chosen", "rejected")
"""What a preference pair of MMPR says, beside its pictures; the first is often missing."""

_MARK = re.compile(f"({IMAGE_MARK}|{VIDEO_MARK})")


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

    A preference pair becomes a record of two branches: its messages are the prompt, the branches
    the chosen answer and the rejected one.

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
            f"the record is {type_name(fields)}, not an object",
            kind="bad_field",
            source=source,
            remedy='write {"conversations": [...]}',
        )
    is_pair = _is_pair(fields)
    turns = _question(fields, source) if is_pair else _turns(fields, source)
    if not is_pair:
        _check_order(turns, source, answered)
    images = images_of(fields, root, source)
    videos = videos_of(fields, root, source)
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
        branches=_pair(fields, source) if is_pair and answered else (),
        dataset=dataset,
        max_tiles=max_tiles,
        augment=augment,
    )


def _is_pair(fields: Mapping[str, object]) -> bool:
    """Whether a question stands by itself, as it does in preference pairs."""
    has_turns = any(not is_absent(fields.get(name)) for name in ("conversations", "messages"))
    return "question" in fields and not has_turns


def _question(fields: Mapping[str, object], source: str) -> list[_Turn]:
    """The prompt of a pair: its system message, if it has one, and the question."""
    texts: list[tuple[Role, str]] = [("user", "question")]
    if not is_absent(fields.get("system_prompt")):
        texts.insert(0, ("system", "system_prompt"))
    return [_Turn(role, text_of(fields.get(name), source, name), name) for role, name in texts]


def _pair(fields: Mapping[str, object], source: str) -> tuple[tuple[Message, ...], ...]:
    """The two answers of a pair, each a branch."""
    chosen, rejected = (
        answer_of(fields.get(name), source, name, f"the {name} answer")
        for name in ("chosen", "rejected")
    )
    if chosen == rejected:
        raise DataError(
            "both answers say the same",
            kind="bad_field",
            source=source,
            field="rejected",
            remedy="remove the pair: there is nothing to prefer",
        )
    return (Message.of("assistant", chosen),), (Message.of("assistant", rejected),)


def _turns(fields: Mapping[str, object], source: str) -> list[_Turn]:
    names = [name for name in ("conversations", "messages") if not is_absent(fields.get(name))]
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
        raise wrong_type(turns, "a list of turns", source, name)
    who, what = ("from", "value") if name == "conversations" else ("role", "content")
    return [_turn(turn, f"{name}[{place}]", who, what, source) for place, turn in enumerate(turns)]


def _turn(turn: object, field: str, who: str, what: str, source: str) -> _Turn:
    if not isinstance(turn, Mapping):
        raise wrong_type(turn, f"an object with {who!r} and {what!r}", source, field)
    role = turn.get(who)
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(
            f"the role is {reprlib.repr(role)}" if who in turn else "the role is missing",
            kind="bad_role",
            source=source,
            field=f"{field}.{who}",
            remedy=f"use one of {', '.join(ROLES)}",
        )
    text, field = turn.get(what), f"{field}.{what}"
    if what == "content" and isinstance(text, Sequence) and not isinstance(text, str | bytes):
        text = "".join(_piece(piece, source, f"{field}[{n}]") for n, piece in enumerate(text))
    if ROLES[role] in ("assistant", "pretrain"):
        return _Turn(ROLES[role], answer_of(text, source, field, f"the turn of {role!r}"), field)
    return _Turn(ROLES[role], text_of(text, source, field), field)


def _piece(piece: object, source: str, field: str) -> str:
    if not isinstance(piece, Mapping):
        raise wrong_type(piece, 'an object with "type"', source, field)
    kind = piece.get("type")
    if kind == "text":
        return text_of(piece.get("text"), source, f"{field}.text")
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
