"""Conversations written in the released format: JSONL records, and the meta file that lists them.

The counterpart of `cascadevl.data.parsing`, which reads every record back before it leaves here:
so what is written trains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from cascadevl.data.parsing import IMAGE_MARK, ROLES, VIDEO_MARK, parse_record
from cascadevl.errors import DataError
from cascadevl.types import ImageRef, Message, Role

_NAMES: dict[Role, str] = {role: name for name, role in reversed(ROLES.items())}
"""Our roles to those of the released format, which come first among `ROLES`."""


def conversation_fields(
    messages: Sequence[Message], *, record_id: str, images: Sequence[str] = ()
) -> dict[str, Any]:
    """One conversation as a record: ``id``, ``image`` if it shows any, ``conversations``.

    Args:
        messages: The turns, with pictures in their places.
        record_id: The record's ``id``.
        images: Paths of the pictures, in the order they are shown, as they are to be written.

    Raises:
        DataError: If the record could not be read back: turns in a wrong order, a video, a mark
            in the text that no picture belongs to, or another number of pictures.
    """
    turns = [{"from": _NAMES[turn.role], "value": _marked(turn, record_id)} for turn in messages]
    fields: dict[str, Any] = {"id": record_id}
    if images:
        fields["image"] = images[0] if len(images) == 1 else list(images)
    fields["conversations"] = turns
    read = parse_record(fields, source=record_id)
    if [turn.text for turn in read.messages] != [turn.text for turn in messages]:
        raise DataError(
            "the text holds marks of pictures that are not shown there",
            kind="image_count",
            source=record_id,
            remedy=f"take {IMAGE_MARK} and {VIDEO_MARK} out of the text",
        )
    return fields


def _marked(message: Message, record_id: str) -> str:
    pieces = []
    for part in message.parts:
        if not isinstance(part, str | ImageRef):
            raise DataError(
                "a video cannot be written here",
                kind="bad_field",
                source=record_id,
                field="video",
                remedy="give its frames as images",
            )
        pieces.append(part if isinstance(part, str) else IMAGE_MARK)
    return "".join(pieces)


def save_picture(image: PIL.Image.Image, folder: Path, name: str) -> str:
    """Save a picture as PNG below a data set's folder; one of that name is written again.

    Args:
        image: The picture.
        folder: The data set's folder.
        name: File name without suffix; what no file name can hold is replaced.

    Returns:
        Its path relative to the folder, as records name it.
    """
    safe = "".join(each if each.isalnum() or each in "-_." else "_" for each in name)
    path = folder / "images" / f"{safe}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return f"images/{safe}.png"


def write_meta(path: Path, datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a meta file, whole or not at all.

    Args:
        path: The file; data sets and pictures are found relative to its folder.
        datasets: Of each data set its ``annotation`` and whatever departs from the defaults.
    """
    common = {"root": "", "data_augment": False, "repeat_time": 1}
    entries = {name: {**common, **entry} for name, entry in datasets.items()}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(entries, indent=2) + "\n", "utf-8")
    partial.replace(path)
