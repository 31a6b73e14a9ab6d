"""What stands on the wire: every message as it was, features to the bit, nonsense refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from cascadevl.engine.requests import Completion, TokenLogprobs, TokenOutput, Usage
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import ServerError
from cascadevl.model.routing import Thresholds
from cascadevl.serving.fleet import NOTHING
from cascadevl.serving.wire import (
    Ask,
    Beat,
    Credit,
    Encode,
    Features,
    Hello,
    Link,
    Message,
    Open,
    Said,
    bits_of,
    dtype_name,
    features_of,
    pixels_of,
)

USAGE = Usage(prompt_tokens=5, visual_tokens=2, cached_tokens=1, completion_tokens=1)
LOGPROBS = TokenLogprobs(-0.25, ((3, -0.25), (4, float("-inf"))))
TOKEN = TokenOutput(request_id=2**60, sample=1, token_id=3, text="über", logprobs=LOGPROBS)
ANSWER = Completion(
    request_id=7,
    sample=0,
    text="a",
    token_ids=(3,),
    finish_reason="stop",
    usage=USAGE,
    logprobs=(LOGPROBS,),
    increments=(0.5,),
)
MESSAGES: list[Message] = [
    Hello("vision", "", "abc"),
    Beat(NOTHING),
    Ask(1, (2, 1), SamplingParams(stop=("a",), top_p=0.5), 3, (0.5, 0.25), True),
    Ask(1, (), SamplingParams(), 1, None, False),
    Encode(5, "language-1", "ipc://x", (b"ab", b"\x00\xff"), (2, 4, 4, 3), (16, 4)),
    Encode(5, "language-1", "ipc://x", (b"ab",), (1, 4, 4, 3), (), 0.5),
    Encode(5, "a", "ipc://x", (b"ab",), (1, 4, 4, 3), (), Thresholds(absolute=0.4, relative=0.7)),
    Open(),
    Credit(2**40),
    Features(5, "bfloat16", (3, 2), 4),
    Said((TOKEN,), (ANSWER,)),
]


def conversation(folder: Path, say: Any) -> Any:
    """Run a function with two links that are joined."""

    async def run() -> Any:
        context: zmq.Context[Any] = zmq.Context()
        server, client = Link(context), Link(context, name="client")
        client.connect(server.bind(f"ipc://{folder}/link"))
        try:
            return await asyncio.wait_for(say(server, client), 20)
        finally:
            server.close()
            client.close()
            context.destroy(linger=0)

    return asyncio.run(run())


def test_every_message_comes_as_it_was(tmp_path: Path):
    async def say(server: Link, client: Link) -> None:
        for message in MESSAGES:
            await client.send(message, b"one", b"")
            parcel = await server.receive()
            assert parcel.message == message
            assert parcel.sender == b"client"
            assert [bytes(frame) for frame in parcel.frames] == [b"one", b""]
            await server.send(message, to=parcel.sender)
            back = await client.receive()
            assert (back.message, back.is_torn) == (message, False)

    conversation(tmp_path, say)


def test_a_gap_is_noticed(tmp_path: Path):
    async def say(server: Link, client: Link) -> list[bool]:
        await client.send(Open())
        torn = [(await server.receive()).is_torn]
        client._sent[b""] += 1  # as if a message had been lost
        for _ in range(2):
            await client.send(Open())
            torn.append((await server.receive()).is_torn)
        return torn

    assert conversation(tmp_path, say) == [False, True, False]


def test_nonsense_is_refused(tmp_path: Path):
    async def say(server: Link, client: Link) -> None:
        for parts in ([b"x"], [b"12345678", b"nonsense"], [b"12345678", b"\x91\xa3Bad"]):
            await client._socket.send_multipart(parts)
            with pytest.raises(ServerError, match="who talks here"):
                await server.receive()

    conversation(tmp_path, say)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_features_arrive_to_the_bit(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    tiles = [torch.randn(number, 4, generator=generator).to(dtype) for number in (16, 4, 16)]
    bits = bits_of(tiles)
    assert len(bits) == 36 * 4 * dtype.itemsize
    message = Features(1, dtype_name(dtype), (16, 4, 16), 4)
    found = features_of(message, bits)
    assert len(found) == 3
    assert all(torch.equal(one, other) for one, other in zip(found, tiles, strict=True))
    with pytest.raises(ServerError, match="36 visual tokens of 4 numbers"):
        features_of(message, bits[1:])
    with pytest.raises(ServerError, match="float99"):
        features_of(Features(1, "float99", (36,), 4), bits)


def test_pixels_must_be_as_many_as_announced():
    message = Encode(1, "a", "b", (b"1", b"2"), (2, 4, 4, 3))
    assert pixels_of(message, memoryview(bytes(range(96)))).shape == (2, 4, 4, 3)
    with pytest.raises(ServerError, match="were announced"):
        pixels_of(message, memoryview(bytes(95)))


def test_an_address_that_cannot_be_had():
    context: zmq.Context[Any] = zmq.Context()
    link = Link(context)
    try:
        with pytest.raises(ServerError, match="cannot listen"):
            link.bind("tcp://256.0.0.1:1")
    finally:
        link.close()
        context.destroy(linger=0)
