"""Both halves in one process: the very classes of the decoupled server, in two threads.

A picture is encoded while another request is answered, as between processes, and nothing is copied
through the kernel. So the decoupled server can be compared with this one, and gives its answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import zmq

from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import EngineStats, Request
from cascadevl.errors import ServerError
from cascadevl.serving.engine_thread import EngineThread, Output
from cascadevl.serving.language_server import LanguageServer
from cascadevl.serving.member import MemberThread
from cascadevl.serving.pipeline import Pipeline
from cascadevl.serving.vision_server import VisionConfig, VisionServer

_FRONT, _FEATURES = "inproc://front", "inproc://features"


class Coupled:
    """Answers with an engine and the vision half of its model, each in a thread of its own."""

    def __init__(self, engine: Engine, vision: VisionConfig | None = None) -> None:
        """Bind an engine; nothing runs before `start`.

        Args:
            engine: Answers, and its model encodes.
            vision: How much is encoded at once; as invariant as the engine if not given.
        """
        self._engine = engine
        invariant = engine.config.batch_invariant
        self._vision = vision or VisionConfig(batch_invariant=invariant)
        self._context: zmq.Context[Any] = zmq.Context()
        self._pipeline = Pipeline(engine.model.config, [_FRONT], context=self._context)
        self._threads: list[MemberThread] = []

    async def start(self) -> None:
        """Start both halves, and wait until they have joined."""
        await self._pipeline.start()
        vision = VisionServer(
            self._engine.model, _FRONT, config=self._vision, context=self._context
        )
        language = LanguageServer(
            EngineThread(self._engine),
            _FRONT,
            _FEATURES,
            image_token_id=int(self._engine.model.config.image_token_id),
            context=self._context,
        )
        self._threads = [MemberThread(vision), MemberThread(language)]
        while self.unready is not None:
            if (failure := self.failure) is not None:
                raise ServerError(failure)
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Stop both."""
        await self._pipeline.stop()
        for thread in self._threads:
            await asyncio.to_thread(thread.close)
        self._context.destroy(linger=0)

    def ask(self, request: Request) -> AsyncGenerator[Output, None]:
        """Answer a request, see `Answers.ask`."""
        return self._pipeline.ask(request)

    def stats(self) -> EngineStats:
        """What both hold, and have done."""
        return self._pipeline.stats()

    @property
    def unready(self) -> str | None:
        """What is missing for the moment."""
        return self._pipeline.unready

    @property
    def failure(self) -> str | None:
        """Why nothing is answered any more: a thread has died."""
        dead = [thread.name for thread in self._threads if not thread.is_alive]
        return f"{' and '.join(dead)} has died" if dead else self._pipeline.failure
