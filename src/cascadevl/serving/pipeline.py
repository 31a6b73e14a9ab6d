"""The front of a decoupled server: who computes which request, and what if somebody is gone.

A request passes three stages: a vision server encodes its pictures, their features travel to a
language server, and that answers. Stages of different requests overlap. The front keeps a request,
pixels included, until it is answered: where a server dies, its requests go to another, or wait for
it to come back.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any

import zmq

from cascadevl.engine.prompts import prepare
from cascadevl.engine.requests import Completion, EngineStats, Request
from cascadevl.errors import CascadeVLError, ServerError, UnavailableError
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.serving.engine_thread import Output, shutting_down
from cascadevl.serving.fleet import Fleet, Server
from cascadevl.serving.journey import Journey, asked_of_router, contents_of
from cascadevl.serving.wire import (
    Accepted,
    Ask,
    Beat,
    Broken,
    Drop,
    Encode,
    Gone,
    Hello,
    Link,
    Parcel,
    Pulse,
    Received,
    Refused,
    Said,
    Who,
)

_LOG = logging.getLogger(__name__)
_ASK_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """How long the front waits.

    Attributes:
        silence_s: A server that says nothing for so long is gone.
        patience_s: A request that waits so long for a server to come is given up.
        max_deaths: A request with which so many servers died is given up: it may be the cause.
    """

    silence_s: float = 5.0
    patience_s: float = 60.0
    max_deaths: int = 3


class Pipeline:
    """Answers requests with vision and language servers, which join and leave as they like.

    Attributes:
        addresses: Where servers join, once it has started.
    """

    def __init__(
        self,
        model_config: CascadeVLConfig,
        addresses: Iterable[str],
        *,
        weights: str = "",
        config: PipelineConfig | None = None,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        """Know where servers will join; nothing is opened before `start`.

        Args:
            model_config: Of the model; requests are held against it.
            addresses: Where servers join.
            weights: Which weights the servers must have.
            config: How long the front waits.
            context: Of the process, where servers are in the same.
        """
        self.addresses = tuple(addresses)
        self._model_config, self._weights = model_config, weights
        self._config = config or PipelineConfig()
        self._owns_context = context is None
        self._context: zmq.Context[Any] = context or zmq.Context()
        # Another start of the front must not take answers for its own that are not.
        self._numbers = itertools.count(secrets.randbits(40) << 20)
        self._open: dict[int, Journey] = {}
        self._fleet = Fleet()
        self._asked: dict[bytes, float] = {}  # when servers that were not known were asked to join
        self._strangers: set[bytes] = set()  # servers of other weights, which were told of
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: str | None = "the front has not started"

    async def start(self) -> None:
        """Let servers join."""
        self._link = Link(self._context)
        self.addresses = tuple(self._link.bind(address) for address in self.addresses)
        self._tasks = [asyncio.ensure_future(each) for each in (self._listen(), self._watch())]
        self._failure = None

    async def stop(self) -> None:
        """End what is open with an error, and let nobody join any more."""
        self._failure = "the front was stopped"
        for journey in self._open.values():
            journey.outputs.put_nowait(shutting_down())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._link.close()
        if self._owns_context:
            self._context.destroy(linger=0)

    @property
    def failure(self) -> str | None:
        """Why nothing is answered any more."""
        for task in self._tasks:
            if self._failure is None and task.done():
                self._failure = f"the front has failed: {task.exception()!r}"
        return self._failure

    @property
    def unready(self) -> str | None:
        """What is missing for the moment: a server of either half."""
        return self._fleet.missing

    def stats(self) -> EngineStats:
        """What all servers hold, and have done."""
        return self._fleet.stats()

    async def ask(self, request: Request) -> AsyncGenerator[Output, None]:
        """Answer a request, see `Answers.ask`."""
        if (failure := self.failure) is not None:
            raise ServerError(f"nothing is answered any more: {failure}")
        loop = asyncio.get_running_loop()
        prompt = await loop.run_in_executor(None, prepare, request, self._model_config)
        contents = contents_of(request, self._model_config.image_token_id)
        journey = Journey(next(self._numbers), request, prompt, contents)
        self._open[journey.number] = journey
        try:
            await self._send_on(journey)
            num_left = request.num_samples
            while num_left:
                output = await journey.outputs.get()
                if isinstance(output, CascadeVLError):
                    raise output
                num_left -= isinstance(output, Completion)
                yield output
        finally:
            del self._open[journey.number]
            await self._leave(journey)

    async def _send_on(self, journey: Journey) -> None:
        """Give a request to the next stage, if a server of it is there."""
        if self._open.get(journey.number) is not journey:
            return  # it was called off meanwhile
        if journey.language is None:
            await self._ask(journey)
        elif journey.awaits_features and journey.vision is None:
            await self._encode(journey)

    async def _ask(self, journey: Journey) -> None:
        server = self._fleet.language()
        if server is None:
            return
        request, contents = journey.request, journey.contents
        journey.language = server
        server.load += request.num_samples
        ask = Ask(
            request=journey.number,
            tiles_per_image=contents.tiles_per_image,
            sampling=request.sampling,
            num_samples=request.num_samples,
            increments=contents.increments,
            stream=request.stream,
            thinking_budget=request.thinking_budget,
        )
        await self._link.send(ask, contents.ids.data.cast("B"), to=server.id)

    async def _encode(self, journey: Journey) -> None:
        tiles = journey.prompt.tiles
        server = self._fleet.vision(tiles[0].content.key)
        if server is None or journey.language is None:
            return
        journey.vision = server
        server.load += len(tiles)
        pixels, unrouted = journey.contents.tiles, journey.prompt.unrouted
        encode = Encode(
            request=journey.number,
            server=journey.language.id.decode(),
            features_at=journey.language.hello.features_at,
            keys=tuple(tile.content.key for tile in tiles),
            shape=(*pixels.shape[:3], 3),
            tokens_per_tile=() if unrouted is not None else journey.prompt.tokens_per_tile,
            budget=None if unrouted is None else asked_of_router(unrouted.budget),
        )
        await self._link.send(encode, pixels.data.cast("B"), to=server.id)

    async def _leave(self, journey: Journey) -> None:
        """Let servers forget a request that has ended, or was called off."""
        if self.failure is not None:
            return
        for server in (journey.vision, journey.language):
            if server is not None:
                await self._link.send(Drop(journey.number), to=server.id)
        self._unload_vision(journey)
        if journey.language is not None:
            journey.language.load -= journey.request.num_samples
            journey.language = None

    def _unload_vision(self, journey: Journey) -> None:
        if journey.vision is not None:
            journey.vision.load -= len(journey.prompt.tiles)
            journey.vision = None

    async def _listen(self) -> None:
        while True:
            try:
                parcel = await self._link.receive()
                await self._take(parcel)
            except ServerError as error:
                _LOG.warning("front: %s", error)

    async def _take(self, parcel: Parcel) -> None:
        server = self._fleet.find(parcel.sender)
        if server is not None and (parcel.is_torn or isinstance(parcel.message, Hello)):
            await self._lose(server, is_dead=False)  # it begins anew, or what it said was lost
            server = None
        if isinstance(parcel.message, Hello):
            await self._welcome(parcel.sender, parcel.message)
            return
        if server is None:
            await self._ask_who(parcel.sender)
            return
        server.seen = time.monotonic()
        match parcel.message:
            case Beat(stats):
                server.stats = stats
                await self._link.send(Pulse(), to=server.id)
            case Broken(language):
                await self._encode_again(server, language)
            case Said() as said:
                await self._hand_on(said, server)
            case Accepted() | Received() | Refused() as word:
                journey = await self._of(word.request, server)
                if journey is not None:
                    await self._go_on(journey, word)
            case _:
                _LOG.warning("front: %s is not for me", type(parcel.message).__name__)

    async def _go_on(self, journey: Journey, word: Accepted | Received | Refused) -> None:
        """Take note of what a language server says of a request."""
        match word:
            case Accepted():
                journey.awaits_features = True
                journey.since = time.monotonic()
                await self._send_on(journey)
            case Received():
                journey.awaits_features = False
                self._unload_vision(journey)
            case Refused():
                journey.outputs.put_nowait(word.error())

    async def _ask_who(self, id_: bytes) -> None:
        """Ask a server that is not known to join; once, though it may have said much meanwhile."""
        now = time.monotonic()
        if now - self._asked.get(id_, -_ASK_AGAIN_S) >= _ASK_AGAIN_S:
            self._asked[id_] = now
            await self._link.send(Who(), to=id_)

    async def _of(self, number: int, server: Server) -> Journey | None:
        """A request that a language server works at; others it is told to forget."""
        journey = self._open.get(number)
        if journey is None or journey.language is not server:
            await self._link.send(Drop(number), to=server.id)
            return None
        return journey

    async def _hand_on(self, said: Said, server: Server) -> None:
        outputs: dict[int, list[Output]] = {}
        together: list[Output] = [*said.tokens, *said.completions]
        for output in together:
            outputs.setdefault(output.request_id, []).append(output)
        for number, mine in outputs.items():
            journey = await self._of(number, server)
            if journey is not None:
                journey.hand_on(mine)

    async def _welcome(self, id_: bytes, hello: Hello) -> None:
        """Take up a server, and give it what waits for one."""
        if hello.weights != self._weights:
            if id_ not in self._strangers:
                self._strangers.add(id_)
                _LOG.error("front: %s has other weights, it is not asked", id_.decode())
            return
        self._fleet.join(id_, hello)
        _LOG.info("front: %s has joined", id_.decode())
        for journey in list(self._open.values()):
            await self._send_on(journey)

    async def _watch(self) -> None:
        """Notice who is gone, and which requests have waited too long."""
        while True:
            await asyncio.sleep(self._config.silence_s / 4)
            for server in self._fleet.silent(self._config.silence_s):
                await self._lose(server)
            latest = time.monotonic() - self._config.patience_s
            for journey in self._open.values():
                if journey.waits and journey.since < latest:
                    journey.outputs.put_nowait(
                        UnavailableError(
                            f"{self._fleet.missing or 'no server answers'}; ask again later"
                        )
                    )

    async def _encode_again(self, vision: Server, language: str) -> None:
        """Have features made again that were lost between two servers."""
        _LOG.warning("front: %s has lost its way to %s", vision.id.decode(), language)
        for journey in list(self._open.values()):
            is_there = journey.language is not None and journey.language.id.decode() == language
            if is_there and journey.vision is vision:
                self._unload_vision(journey)
                await self._send_on(journey)

    async def _lose(self, server: Server, *, is_dead: bool = True) -> None:
        """Give the requests of a server that is gone to others."""
        if self._fleet.find(server.id) is not server:
            return
        _LOG.warning("front: %s is gone", server.id.decode())
        self._fleet.leave(server)
        if server.hello.role == "language":
            for vision in self._fleet.of("vision"):
                await self._link.send(Gone(server.id.decode()), to=vision.id)
        for journey in list(self._open.values()):
            if server not in (journey.vision, journey.language):
                continue
            journey.num_deaths += is_dead
            if journey.num_deaths >= self._config.max_deaths:
                journey.outputs.put_nowait(
                    ServerError(
                        f"{journey.num_deaths} servers were lost while they computed this request; "
                        f"it is not tried again"
                    )
                )
                continue
            if journey.language is server:
                if journey.vision is not None:
                    await self._link.send(Drop(journey.number), to=journey.vision.id)
                self._unload_vision(journey)
                journey.begin_again()
            else:
                journey.vision = None
                journey.since = time.monotonic()
            await self._send_on(journey)
