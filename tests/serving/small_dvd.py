"""A decoupled server in the processes and threads of a test, around a small model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from tests.engine.small_talk import conversations

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import Completion, EngineConfig, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.serving.engine_thread import Answers, EngineThread, Output
from cascadevl.serving.language_server import LanguageServer
from cascadevl.serving.member import Member, MemberThread
from cascadevl.serving.pipeline import Pipeline, PipelineConfig
from cascadevl.serving.vision_server import VisionConfig, VisionServer

QUICK = PipelineConfig(silence_s=2.0, patience_s=30.0)
INVARIANT = EngineConfig(num_pages=400, page_tokens=4, batch_invariant=True)
DRAWN = {"temperature": 1.3, "seed": 5, "logprobs": 2}


def requests(processor: CascadeVLProcessor, **more: Any) -> list[Request]:
    """Questions with several pictures, with one, with none."""
    sampling = SamplingParams(**{"max_tokens": 10, "ignore_eos": True} | more.pop("sampling", {}))
    return [
        Request(prompt=processor.prompt(talk), sampling=sampling, **more)
        for talk in conversations()
    ]


async def all_of(answers: Answers, request: Request) -> list[Output]:
    return [output async for output in answers.ask(request)]


async def answers_of(answers: Answers, request: Request) -> tuple[Completion, ...]:
    found = [o for o in await all_of(answers, request) if isinstance(o, Completion)]
    return tuple(sorted(found, key=lambda answer: answer.sample))


async def all_answers(answers: Answers, wishes: Sequence[Request]) -> list[tuple[Completion, ...]]:
    return await asyncio.gather(*(answers_of(answers, each) for each in wishes))


def said(answers: Sequence[Sequence[Completion]]) -> list[list[tuple[tuple[int, ...], str]]]:
    return [[(each.token_ids, each.text) for each in answer] for answer in answers]


def language_server(engine: Engine, front: str, features_at: str, **more: Any) -> LanguageServer:
    """One that computes with an engine of ours."""
    mark = int(engine.model.config.image_token_id)
    return LanguageServer(EngineThread(engine), front, features_at, image_token_id=mark, **more)


@asynccontextmanager
async def working(member: Member) -> AsyncIterator[Member]:
    """A server in a thread of the test."""
    thread = MemberThread(member)
    try:
        yield member
    finally:
        await asyncio.to_thread(thread.close)


@asynccontextmanager
async def decoupled(
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    folder: Path,
    *,
    num_vision: int = 1,
    num_language: int = 1,
    engine: EngineConfig | None = None,
    vision: VisionConfig | None = None,
    window_bytes: int = 2**20,
    address: str | None = None,
    config: PipelineConfig = QUICK,
) -> AsyncIterator[Pipeline]:
    """A front, and servers of both halves."""
    engine = engine or EngineConfig(num_pages=400, page_tokens=4)
    vision = vision or VisionConfig(batch_invariant=engine.batch_invariant)
    pipeline = Pipeline(model.config, [address or f"ipc://{folder}/front"], config=config)
    await pipeline.start()
    (front,) = pipeline.addresses
    async with AsyncExitStack() as stack:
        for _ in range(num_vision):
            encoder = VisionServer(model, front, config=vision)
            await stack.enter_async_context(working(encoder))
        for number in range(num_language):
            at = "tcp://127.0.0.1:0" if address else f"ipc://{folder}/language{number}"
            server = language_server(
                Engine(model, processor, engine), front, at, window_bytes=window_bytes
            )
            await stack.enter_async_context(working(server))
        try:
            await joined(pipeline, num_vision + num_language)
            yield pipeline
        finally:
            await pipeline.stop()


async def joined(pipeline: Pipeline, number: int) -> None:
    """Wait until so many servers have joined."""
    for _ in range(9000):
        fleet = pipeline._fleet
        if len(fleet.of("vision")) + len(fleet.of("language")) >= number:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"not all of {number} servers have joined")


async def asked(answers: Answers, wishes: Sequence[Request]) -> list[tuple[Completion, ...]]:
    """What somebody answers who works for these questions alone."""
    await answers.start()
    try:
        return await all_answers(answers, wishes)
    finally:
        await answers.stop()


def by_engine(
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    wishes: Sequence[Request],
) -> list[tuple[Completion, ...]]:
    """What an engine answers in this thread."""
    return Engine(model, processor, INVARIANT).generate(wishes)


def facts(answers: list[tuple[Completion, ...]]) -> list[list[Any]]:
    """All of the answers that must be equal to the bit."""
    return [
        [(a.token_ids, a.text, a.finish_reason, a.logprobs, a.increments) for a in each]
        for each in answers
    ]


class Cable:
    """A way over TCP that can be cut; it can be used again at once."""

    def __init__(self, target: str) -> None:
        self._port = int(target.rpartition(":")[2])
        self._writers: list[asyncio.StreamWriter] = []
        self.num_cut = 0

    async def open(self) -> str:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        self.num_cut += len(self._writers) // 2
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def close(self) -> None:
        self._server.close()
        self.cut()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, back]
        await asyncio.gather(pump(reader, back), pump(there, writer))


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while content := await reader.read(4096):
            writer.write(content)
            await writer.drain()
    writer.close()
