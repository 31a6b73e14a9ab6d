"""Messages as OpenAI's chat completions take them, pictures as data URLs."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from cascadevl.data.image import open_image
from cascadevl.errors import RequestError
from cascadevl.types import ImageRef, Message, VideoRef

_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}
"""First bytes of the formats that every server reads; others are sent as PNG."""


def message_fields(message: Message) -> dict[str, Any]:
    """One turn in OpenAI's form; a turn of text alone keeps its content as text.

    Args:
        message: The turn.

    Raises:
        RequestError: If it shows a video, which the API has no part for.
        DataError: If a picture cannot be opened.
    """
    if all(isinstance(part, str) for part in message.parts):
        return {"role": message.role, "content": message.text}
    parts: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, VideoRef):
            raise RequestError(
                f"the video {part.source} cannot be sent to a server; give frames as pictures"
            )
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        else:
            parts.append({"type": "image_url", "image_url": {"url": data_url(part)}})
    return {"role": message.role, "content": parts}


def data_url(image: ImageRef) -> str:
    """A picture as a data URL: a file in a common format as it is, everything else as PNG.

    Args:
        image: The picture.

    Raises:
        DataError: If it cannot be opened.
    """
    source = image.source
    name = str(source) if isinstance(source, Path) else "picture"
    picture = open_image(image, source=name)  # broken files are found here, not by the server
    if isinstance(source, Path):
        source = source.read_bytes()
    if isinstance(source, bytes):
        for signature, kind in _SIGNATURES.items():
            if source.startswith(signature):
                return _encoded(kind, source)
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return _encoded("png", buffer.getvalue())


def _encoded(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
