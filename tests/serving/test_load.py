"""Many clients at once, some of whom leave: nobody gets another's answer, and nothing is left."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any
from urllib.parse import urlsplit

import pytest
from openai import AsyncOpenAI
from tests.engine.small_talk import picture
from tests.serving.small_server import NAME, Served, answering, shown, small_pair

from cascadevl.data.chat import to_messages
from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import EngineConfig, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.serving.coupled import Coupled

NUM_KINDS, NUM_CLIENTS = 12, 40


def conversation(kind: int) -> list[dict[str, Any]]:
    text = {"type": "text", "text": "one two three four"[: 5 + kind]}
    parts = [shown(picture(kind, (30 + 5 * kind, 40)))] * (kind % 3)
    return [{"role": "user", "content": [*parts, text]}]


def wish(kind: int, max_tokens: int) -> dict[str, Any]:
    return {
        "model": NAME,
        "messages": conversation(kind),
        "temperature": 1.0,
        "seed": kind,
        "max_tokens": max_tokens,
        "stream": True,
    }


async def ask(client: AsyncOpenAI, kind: int) -> str:
    stream = await client.chat.completions.create(
        **wish(kind, 8 + kind), extra_body={"ignore_eos": True}
    )
    text, num_ends = "", 0
    async for event in stream:
        text += event.choices[0].delta.content or ""
        num_ends += event.choices[0].finish_reason is not None
    assert num_ends == 1
    return text


async def leave(address: str, kind: int) -> None:
    """Hang up after the first words.

    By a socket: OpenAI's client leaves its generators to the garbage collector when it goes early,
    which then runs in whichever of this process's threads allocates next.
    """
    url = urlsplit(address)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    body = json.dumps(wish(kind, 300) | {"ignore_eos": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {url.netloc}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    try:
        num_events = 0
        while num_events < 3:  # the first may tell no more than the role
            line = await reader.readline()
            assert line, "the server hung up first"
            num_events += line.startswith(b"data: {")
    finally:
        writer.close()
        await writer.wait_closed()


async def load(served: Served, num_requests: int) -> list[tuple[int, str | None]]:
    rng = random.Random(0)
    todo = [(rng.randrange(NUM_KINDS), rng.random() < 0.2) for _ in range(num_requests)]
    found: list[tuple[int, str | None]] = []
    async with AsyncOpenAI(
        base_url=f"{served.address}/v1", api_key="none", max_retries=0, timeout=280
    ) as client:

        async def work() -> None:
            while todo:
                kind, leaves = todo.pop()
                answer = await (leave(served.address, kind) if leaves else ask(client, kind))
                found.append((kind, answer))

        await asyncio.gather(*(work() for _ in range(NUM_CLIENTS)))
        for _ in range(500):
            stats = served.api.answers.stats()
            if served.api.admission.num_open == stats.running == stats.waiting == 0:
                break
            await asyncio.sleep(0.05)
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_requests", [80, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_clients(num_requests: int):
    model, processor = small_pair()
    config = EngineConfig(num_pages=300, page_tokens=4, batch_invariant=True)
    wishes = [
        Request(
            prompt=processor.prompt(to_messages(conversation(kind))),
            sampling=SamplingParams(
                max_tokens=8 + kind, ignore_eos=True, temperature=1.0, seed=kind
            ),
        )
        for kind in range(NUM_KINDS)
    ]
    expected = [answer.text for (answer,) in Engine(model, processor, config).generate(wishes)]
    engine = Engine(model, processor, config)
    with answering(Coupled(engine), processor, model) as served:
        found = asyncio.run(load(served, num_requests))
        stats = served.api.answers.stats()
        assert (served.api.admission.num_open, stats.running, stats.waiting) == (0, 0, 0)
    engine.check()
    assert len(found) == num_requests
    assert all(text in (None, expected[kind]) for kind, text in found)
    assert sum(text is None for _, text in found) > num_requests / 10
