"""Conversations as transformers and HTTP APIs write them, and as messages.

Transformers' processors take lists of ``{"role": ..., "content": ...}``; these functions turn them
into `Message` and give the Jinja template by which plain transformers writes the same prompt.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, TypedDict
from urllib.parse import unquote, urlsplit

import numpy as np
import PIL.Image

from cascadevl.data.conversation import IMAGE_CONTEXT, End, Template, check_text, render
from cascadevl.data.parsing import ROLES, VIDEO_MARK
from cascadevl.data.tools import calls_as_text, has_tools, tools_jinja
from cascadevl.errors import DataError
from cascadevl.types import ImageRef, Message, Part, VideoRef

ChatMessage: TypeAlias = Message | Mapping[str, object]
"""A turn: ours, or ``{"role": "user", "content": "text" or [{"type": "image", ...}, ...]}``."""


class Mode(TypedDict):
    """What a prompt is rendered with besides its turns; see `render`."""

    system: str | None
    thinking: bool | None
    force_thinking: bool
    end: End


_IMAGE_KEYS = ("image", "path", "url", "base64")
_VIDEO_KEYS = ("video", "path", "url")


def to_messages(
    conversation: Sequence[object], *, placeholders: bool = False, calls: bool = False
) -> tuple[Message, ...]:
    """Read a conversation in transformers' form.

    A picture or video is followed by a line break, as the released chat templates write it.

    Args:
        conversation: Turns, each a `ChatMessage`; a content is text, or a list of
            ``{"type": "text", "text": ...}``,
            ``{"type": "image", "image" | "path" | "url" | "base64": ...}`` (a file, a data or
            file URL, bytes, a PIL picture or an RGB array), OpenAI's
            ``{"type": "image_url", "image_url": {"url": ...}}`` (a file, a data or file URL) and
            ``{"type": "video", "video" | "path" | "url": ...}`` (a file or a folder of frames).
        placeholders: Whether a picture or video may leave its source open, for text in which
            only its place counts.
        calls: Whether turns may call tools (``tool_calls``); the calls become text.

    Raises:
        DataError: Of kind ``message``, if a turn has another form.
    """
    return tuple(
        _to_message(turn, number, placeholders, calls) for number, turn in enumerate(conversation)
    )


def _to_message(turn: object, number: int, placeholders: bool, calls: bool) -> Message:
    if isinstance(turn, Message):
        return turn
    place = f"message {number + 1}"
    if not isinstance(turn, Mapping):
        raise _error(f"{place} is {turn!r:.60}", 'write {"role": ..., "content": ...}')
    name, content = turn.get("role"), turn.get("content")
    if not isinstance(name, str) or name not in ROLES:
        raise _error(f"{place} has the role {name!r}", f"use {', '.join(ROLES)}")
    called = calls_as_text(turn, place)
    if called and not calls:
        raise _error(f"{place} calls a tool, but no tools are given", "pass tools=[...]")
    if called:
        content = content or ""
    if isinstance(content, str):
        return Message.of(ROLES[name], "\n".join(filter(None, (content, called))))
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise _error(f"{place} has the content {content!r:.60}", "give text, or a list of parts")
    parts = [part for item in content for part in _parts(item, place, placeholders)]
    if called:
        parts.append(f"\n{called}" if parts else called)
    return Message(ROLES[name], tuple(parts))


def _parts(item: object, place: str, placeholders: bool) -> tuple[Part, ...]:
    if not isinstance(item, Mapping):
        raise _error(f"a part of {place} is {item!r:.60}", 'write {"type": ..., ...}')
    kind = item.get("type")
    if kind == "text" and isinstance(item.get("text"), str):
        return (str(item["text"]),)
    if placeholders and kind in ("image", "video") and set(item) == {"type"}:
        return ImageRef(b"") if kind == "image" else VideoRef(source=Path()), "\n"
    if kind == "image":
        return ImageRef(image_of(_value(item, _IMAGE_KEYS, place), place)), "\n"
    if kind == "image_url":
        return ImageRef(image_of(_openai_url(item, place), place)), "\n"
    if kind == "video":
        video = _value(item, _VIDEO_KEYS, place)
        if not isinstance(video, str | Path):
            raise _error(f"{place} shows a video that is {video!r:.60}", "give a file or a folder")
        return VideoRef(source=_path(video)), "\n"
    raise _error(f"{place} has a part of type {kind!r}", "use text, image, image_url or video")


def _openai_url(item: Mapping[object, object], place: str) -> str:
    """The address in OpenAI's part of a picture, also where it stands without its object."""
    value = item.get("image_url")
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str):
        raise _error(f"{place} has an image_url without url", 'write {"url": ...}')
    return url


def _value(item: Mapping[object, object], keys: Sequence[str], place: str) -> object:
    found = [key for key in keys if item.get(key) is not None]
    if len(found) != 1:
        how_many = f"{len(found)} sources" if found else "no source"
        raise _error(
            f"{place} has a part of type {item['type']!r} that names {how_many}",
            f"give exactly one of {', '.join(keys)}",
        )
    value = item[found[0]]
    if found[0] == "base64" and isinstance(value, str):
        return _decoded(value, place)
    return value


def image_of(value: object, place: str) -> Path | bytes | PIL.Image.Image:
    """Where a picture is, from any form a caller may give it.

    Args:
        value: A file, a data or file URL, bytes, a PIL picture or an RGB array.
        place: Named in errors.

    Raises:
        DataError: Of kind ``message``, if it is none of these.
    """
    if isinstance(value, PIL.Image.Image | bytes):
        return value
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
            raise _error(
                f"{place} shows an array of {value.dtype} with shape {value.shape}",
                "give an RGB array of uint8 with shape (height, width, 3)",
            )
        return PIL.Image.fromarray(value)
    if isinstance(value, str) and value.startswith("data:"):
        header, _, data = value.partition(",")
        if not header.endswith(";base64"):
            raise _error(f"{place} shows a data URL that is not base64", "encode it in base64")
        return _decoded(data, place)
    if isinstance(value, str | Path):
        return _path(value)
    raise _error(
        f"{place} shows a picture that is {value!r:.60}",
        "give a file, bytes, a PIL picture or an RGB array",
    )


def _path(value: str | Path) -> Path:
    """A file, also from a ``file://`` URL; other addresses are refused where it is opened."""
    if isinstance(value, str) and value.startswith("file://"):
        return Path(unquote(urlsplit(value).path))
    return Path(value)


def _decoded(data: str, place: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _error(f"a picture of {place} is not base64 ({error})", "encode it again") from error


def _error(problem: str, remedy: str) -> DataError:
    return DataError(problem, kind="message", remedy=remedy)


def jinja_template(template: Template, system: str) -> str:
    """The chat template for plain transformers that writes the same prompts.

    With an empty system message and the template ``internvl2_5`` it is the released one, letter
    by letter, but for the case that tools are given, which the released one ignores. Reasoning
    inside earlier answers is written as it stands.

    Args:
        template: The form.
        system: System message of conversations that have none; empty for none.
    """
    text = _jinja_text
    user_before, after = template.around["user"]
    before, _, name_end = user_before.partition("user")
    header = "{{'" + before + "' + message['role'] + '" + name_end.replace("\n", "\\n") + "'}}"
    closing = text(after).replace("' }}", "'}}")
    if template.answer_start + template.answer_open != before + "assistant" + name_end:
        answer_start = text(template.answer_start + template.answer_open)
        is_answer = "{% if message['role'] == 'assistant' %}"
        header = f"{is_answer}{answer_start}{{% else %}}{header}{{% endif %}}"
        ends = (template.last_answer_end, template.answer_end)
        last, inner = (text(end + template.answer_tail) for end in ends)
        closing = (
            f"{{% if message['role'] != 'assistant' %}}{closing}"
            f"{{% elif loop.last and not add_generation_prompt %}}{last}"
            f"{{% else %}}{inner}{{% endif %}}"
        )
    default = ""
    if system:
        first = text("".join((template.around["system"][0], system, template.around["system"][1])))
        default = f"{{% if not messages or messages[0]['role'] != 'system' %}}{first}{{% endif %}}"
    plain = (
        default
        + "{% for message in messages %}"
        + header
        + _jinja_content("message['content']")
        + closing
        + "{% endfor %}{% if add_generation_prompt %}"
        + text(template.answer_start)
        + "{% endif %}"
    )
    if not has_tools(template):
        return plain
    calling = tools_jinja(_jinja_content("message['content'] or []"), text, system)
    return f"{{% if tools %}}{calling}{{% else %}}{plain}{{% endif %}}"


def _jinja_text(value: str) -> str:
    """A string as a Jinja expression, in the quotes the released template has."""
    if "'" in value:
        return "{{ " + json.dumps(value, ensure_ascii=False) + " }}"
    return "{{'" + value.replace("\n", "\\n") + "' }}"


def _jinja_content(items: str) -> str:
    """What writes a message's content: text, or parts of it."""
    return (
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        f"{{% for content in {items} %}}"
        "{% if content['type'] == 'image' %}{{ '"
        + IMAGE_CONTEXT
        + "\\n' }}{% elif content['type'] == 'video' %}{{ '"
        + VIDEO_MARK
        + "\\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
    )


def as_text(
    messages: Sequence[Message], template: Template, control: re.Pattern[str], mode: Mode
) -> str:
    """A conversation as text, each picture as its placeholder, each video as its mark.

    Args:
        messages: The turns.
        template: The form.
        control: What nobody may write in a message.
        mode: System message, thinking and how the text ends.

    Raises:
        DataError: If a message cannot be used.
    """
    shown = []
    for message in messages:
        check_text(message, control)
        parts = (VIDEO_MARK if isinstance(part, VideoRef) else part for part in message.parts)
        shown.append(replace(message, parts=tuple(parts)))
    pieces = render(shown, template, **mode)
    return "".join(
        piece.content if isinstance(piece.content, str) else IMAGE_CONTEXT for piece in pieces
    )
