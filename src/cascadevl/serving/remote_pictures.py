"""Addresses in the body of a request become data URLs, so that all that follows knows one form."""

from __future__ import annotations

import base64

from cascadevl.errors import RequestError
from cascadevl.serving.openai_schema import Address, ChatRequest, ImagePart, VideoPart
from cascadevl.serving.remote import Fetcher, Room
from cascadevl.serving.waiting import together

_SCHEMES = ("http:", "https:")


async def fetch_pictures(body: ChatRequest, fetcher: Fetcher, room: Room) -> None:
    """Fetch the pictures and videos of a request that stand at addresses.

    Args:
        body: The request; each address in it is replaced by what stands there.
        fetcher: Knows which addresses may be asked.
        room: Bytes that all of them may bring.

    Raises:
        RequestError: If one cannot be had.
    """
    named: dict[str, list[Address]] = {}
    for message in body.messages:
        for part in message.content if isinstance(message.content, list) else ():
            if isinstance(part, ImagePart | VideoPart):
                address = part.image_url if isinstance(part, ImagePart) else part.video_url
                if address.url.lower().startswith(_SCHEMES):
                    named.setdefault(address.url, []).append(address)
    contents = await together([fetcher.fetch(url, room) for url in named])
    for content, addresses in zip(contents, named.values(), strict=True):
        if not content:
            raise RequestError("there is nothing at the address of a picture; check it")
        url = f"data:;base64,{base64.b64encode(content).decode('ascii')}"
        for address in addresses:
            address.url = url
