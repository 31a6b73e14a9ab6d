"""The vision half as a server: tiles of many requests in, their visual tokens out.

The router is part of it (InternVL3.5-Flash): it decides for the tiles of each request how many
visual tokens they get, so that only those travel.

Two of the three stages of the pipeline are here, and overlap: one thread encodes while what it has
encoded is sent. Features go straight to the language server that asked, as far as it has given
credit; what it has no room for waits here, and where too much waits nothing more is encoded.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import zmq
from torch import Tensor

from cascadevl.engine.contents import Content
from cascadevl.engine.prompts import Tile
from cascadevl.engine.requests import EngineStats
from cascadevl.engine.vision import VisionCache
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.routing import KeepShare, Thresholds, compressed_tiles, tokens_of
from cascadevl.serving.member import BEAT_S, Member
from cascadevl.serving.wire import (
    Broken,
    Credit,
    Drop,
    Encode,
    Features,
    Gone,
    Link,
    Open,
    Parcel,
    Pulse,
    Who,
    bits_of,
    dtype_name,
    pixels_of,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """How much the vision server may hold and do at once.

    Attributes:
        max_batch_tiles: Most tiles encoded at once; a request of more is encoded alone.
        feature_bytes: Memory for visual tokens that are kept for a next question.
        unsent_bytes: While features of more bytes wait for credit, nothing is encoded.
        batch_invariant: Encode every tile with the same operations whatever else is encoded.
    """

    max_batch_tiles: int = 16
    feature_bytes: int = 2**28
    unsent_bytes: int = 2**28
    batch_invariant: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """Tiles of a request.

    Attributes:
        request: Its number.
        server: Who gets their features.
        features_at: Where that takes them.
        contents: What the tiles show.
        tokens_per_tile: Visual tokens of each, if that is decided.
        budget: What the router decides by otherwise.
    """

    request: int
    server: str
    features_at: str
    contents: tuple[Content, ...]
    tokens_per_tile: tuple[int, ...]
    budget: KeepShare | Thresholds | None


@dataclass(slots=True, eq=False)
class _Way:
    """The way to a language server.

    Attributes:
        link: The socket.
        credit: Bytes that may be sent.
        window: Bytes that could be sent at the beginning.
        outgoing: Messages that wait for credit, with their bits.
        changed: Set when there is more of either.
    """

    link: Link
    credit: int = 0
    window: int = 0
    outgoing: deque[tuple[Features, memoryview]] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class VisionServer(Member):
    """Encodes tiles for language servers."""

    def __init__(
        self,
        model: CascadeVLForConditionalGeneration,
        front: str,
        *,
        weights: str = "",
        config: VisionConfig | None = None,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        """Bind a model, or its vision half.

        Args:
            model: Encodes.
            front: Where the front is.
            weights: Which weights these are; servers of others cannot join the same front.
            config: How much may be held and done at once.
            context: Of the process, where the front is in the same.
        """
        super().__init__("vision", front, weights=weights, context=context)
        self._config = config = config or VisionConfig()
        self._cache = VisionCache(
            model, config.feature_bytes, batch_invariant=config.batch_invariant
        )
        self._queue: deque[_Job] = deque()
        self._dropped: set[int] = set()  # called off while they were encoded
        self._encoding: set[int] = set()
        self._ways: dict[str, _Way] = {}
        self._num_ways = 0
        self._more = asyncio.Event()
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="vision")

    def stats(self) -> EngineStats:
        """Tiles that were encoded and found, and requests that wait."""
        return EngineStats(
            waiting=len(self._queue),
            running=len(self._encoding),
            pages=0,
            free_pages=0,
            steps=0,
            prompt_tokens=0,
            cached_tokens=0,
            decoded_tokens=0,
            preemptions=0,
            encoded_tiles=self._cache.num_encoded,
            cached_tiles=self._cache.num_found,
        )

    async def work(self) -> None:
        """Encode what waits, as long as what is encoded finds its way."""
        while True:
            await self._more.wait()
            self._more.clear()
            while self._queue and self._unsent_bytes() <= self._config.unsent_bytes:
                await self._encode_some()

    async def take(self, parcel: Parcel) -> None:
        """Take a message of the front."""
        match parcel.message:
            case Encode() as message:
                self._queue.append(_job(message, parcel.frames[0]))
                self._more.set()
            case Drop(request):
                self._queue = deque(job for job in self._queue if job.request != request)
                if request in self._encoding:
                    self._dropped.add(request)
                for way in self._ways.values():
                    way.outgoing = deque(
                        each for each in way.outgoing if each[0].request != request
                    )
                self._more.set()
            case Gone(server):
                self._forget(server)
            case _:
                self.surprised(parcel)

    async def reset(self) -> None:
        """Forget all requests: the front will ask again."""
        self._queue.clear()
        self._dropped |= self._encoding
        for server in list(self._ways):
            self._forget(server)

    def close(self) -> None:
        """Let go of everything."""
        for server in list(self._ways):
            self._forget(server)
        self._computing.shutdown(wait=False, cancel_futures=True)
        super().close()

    async def _encode_some(self) -> None:
        """Encode the tiles of one request, or of several that make no more than a batch."""
        jobs = [self._queue.popleft()]
        num_tiles, most = len(jobs[0].contents), self._config.max_batch_tiles
        while self._queue and num_tiles + len(self._queue[0].contents) <= most:
            jobs.append(self._queue.popleft())
            num_tiles += len(jobs[-1].contents)
        self._encoding = {job.request for job in jobs}
        loop = asyncio.get_running_loop()
        made = await loop.run_in_executor(self._computing, self._encoded, jobs)
        for job, (message, bits) in zip(jobs, made, strict=True):
            if job.request not in self._dropped:
                way = self._way(job)
                way.outgoing.append((message, bits))
                way.changed.set()
        self._encoding.clear()
        self._dropped.clear()

    def _encoded(self, jobs: Sequence[_Job]) -> list[tuple[Features, memoryview]]:
        """Messages of features, made in the thread that computes."""
        counts = self._routed(jobs)
        tiles = [
            Tile(0, number, content)
            for job, numbers in zip(jobs, counts, strict=True)
            for content, number in zip(job.contents, numbers, strict=True)
        ]
        features = iter(self._cache.features(tiles))
        made = []
        for job, numbers in zip(jobs, counts, strict=True):
            mine: list[Tensor] = [next(features) for _ in numbers]
            dtype, width = dtype_name(mine[0].dtype), mine[0].shape[1]
            made.append((Features(job.request, dtype, numbers, width), bits_of(mine)))
        return made

    def _routed(self, jobs: Sequence[_Job]) -> list[tuple[int, ...]]:
        """Visual tokens of the tiles of each request; the router is asked for all at once."""
        undecided = [each for job in jobs if job.budget is not None for each in job.contents]
        chances = iter(self._cache.probabilities(undecided).unbind() if undecided else ())
        config = self._cache.model.config
        counts = []
        for job in jobs:
            numbers = job.tokens_per_tile
            if job.budget is not None:
                mine = torch.stack([next(chances) for _ in job.contents])
                numbers = tokens_of(config, compressed_tiles(mine, job.budget))
            counts.append(numbers)
        return counts

    def _unsent_bytes(self) -> int:
        return sum(len(bits) for way in self._ways.values() for _, bits in way.outgoing)

    def _way(self, job: _Job) -> _Way:
        """The way to a language server, which is opened with the first features for it."""
        way = self._ways.get(job.server)
        if way is None:
            self._num_ways += 1  # another way to the same server is somebody else for it
            link = Link(self.context, name=f"{self.name}/{self._num_ways}")
            way = self._ways[job.server] = _Way(link)
            link.connect(job.features_at)
            way.tasks = [
                asyncio.ensure_future(self._collect(way, job.server)),
                asyncio.ensure_future(self._transfer(way)),
                asyncio.ensure_future(self._pulse(way)),
            ]
        return way

    def _forget(self, server: str) -> None:
        way = self._ways.pop(server, None)
        if way is not None:
            for task in way.tasks:
                task.cancel()
            way.link.close()
            self._more.set()

    async def _collect(self, way: _Way, server: str) -> None:
        """Collect credit; a way that has lost something is given up, and opened anew."""
        await way.link.send(Open())
        while True:
            parcel = await way.link.receive()
            if parcel.is_torn or isinstance(parcel.message, Who):
                await self.front.send(Broken(server))
                self._forget(server)
                return
            if isinstance(parcel.message, Credit):
                way.credit += parcel.message.num_bytes
                way.window = max(way.window, way.credit)
                way.changed.set()

    async def _pulse(self, way: _Way) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            await way.link.send(Pulse())

    async def _transfer(self, way: _Way) -> None:
        """Send what credit allows; more than a whole window goes once the window is free."""
        while True:
            await way.changed.wait()
            way.changed.clear()
            while way.outgoing:
                message, bits = way.outgoing[0]
                if way.credit < min(len(bits), way.window) or not way.window:
                    break
                way.outgoing.popleft()
                way.credit -= len(bits)
                await way.link.send(message, bits)
                self._more.set()


def _job(message: Encode, pixels: memoryview) -> _Job:
    """What is to be encoded, and how it is routed."""
    budget = KeepShare(message.budget) if isinstance(message.budget, float) else message.budget
    contents = tuple(
        Content(key, pixels=tile)
        for key, tile in zip(message.keys, pixels_of(message, pixels), strict=True)
    )
    return _Job(
        request=message.request,
        server=message.server,
        features_at=message.features_at,
        contents=contents,
        tokens_per_tile=message.tokens_per_tile,
        budget=budget,
    )
