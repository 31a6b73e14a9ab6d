"""The pictures and the video that a record names; none of them is opened here."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import PIL.Image

from cascadevl.data.field_values import is_absent, text_of
from cascadevl.data.image import reject_url
from cascadevl.errors import DataError
from cascadevl.types import ImageRef, Part, VideoRef


def images_of(fields: Mapping[str, object], root: Path | None, source: str) -> list[Part]:
    """The pictures of a record: ``image`` or ``images``, one or a list.

    Args:
        fields: The record.
        root: Folder that relative paths start from; None takes paths as they are.
        source: Where the record stands, for errors.

    Raises:
        DataError: Of kind ``bad_field`` or ``unsupported_source``.
    """
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
    path = text_of(value, source, field)
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


def videos_of(fields: Mapping[str, object], root: Path | None, source: str) -> list[Part]:
    """The video of a record, if it has one: ``video`` or ``videos``, with its ``clip``.

    Args:
        fields: The record.
        root: Folder that relative paths start from; None takes paths as they are.
        source: Where the record stands, for errors.

    Raises:
        DataError: Of kind ``bad_field``, ``bad_clip``, ``video_count`` or ``unsupported_source``.
    """
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
    given = [name for name in names if not is_absent(fields.get(name))]
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
