"""Requests on their way through a server, as discrete events: who waits for whom, and how long.

The rules are those of the real servers (`cascadevl.serving`, `cascadevl.engine.scheduler`): a
vision server encodes the tiles of several requests together and sends them on while it encodes the
next; a language server gives every running answer a token in each step, and reads prompts with what
is left of the step's tokens, in the order in which they came. A coupled server takes turns: tiles,
then a step.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any, TypeAlias

import numpy as np
import simpy

from cascadevl.errors import ConfigError
from cascadevl.planning.service import Ask, Service, Step

_Events: TypeAlias = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which servers there are.

    Attributes:
        language: Language servers; without vision servers they encode, too.
        vision: Vision servers; 0 is the coupled arrangement.
    """

    language: int = 1
    vision: int = 0

    def __post_init__(self) -> None:
        """Refuse a server that cannot answer.

        Raises:
            ConfigError: If a number is too small.
        """
        if self.language < 1 or self.vision < 0:
            raise ConfigError(
                f"{self.language} language and {self.vision} vision servers; at least one of the "
                f"first is needed"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How much is computed at once; the defaults are those of our servers.

    Attributes:
        max_batch_tiles: Most tiles encoded at once; a request of more is encoded alone.
        max_step_tokens: Most tokens of a step.
        max_running: Most answers computed at once.
    """

    max_batch_tiles: int = 16
    max_step_tokens: int = 2048
    max_running: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How requests come. They do not wait for each other (open loop).

    Attributes:
        rate: Requests a second; infinite for all of them at once.
        num_requests: How many.
        seed: Of exponential gaps (Poisson arrivals); None for equal ones.
    """

    rate: float
    num_requests: int
    seed: int | None = 0

    def __post_init__(self) -> None:
        """Refuse what is no load.

        Raises:
            ConfigError: If a number is not positive.
        """
        if not self.rate > 0 or self.num_requests < 1:
            raise ConfigError(
                f"{self.num_requests} requests at {self.rate} a second; both must be above 0"
            )

    def gaps(self) -> list[float]:
        """Seconds before each request."""
        if self.seed is None:
            return [1.0 / self.rate] * self.num_requests
        chance = random.Random(self.seed)
        return [chance.expovariate(1.0) / self.rate for _ in range(self.num_requests)]


@dataclass(frozen=True, slots=True)
class Run:
    """What became of the requests.

    Attributes:
        arrivals: When each came.
        tokens: When each had each of its tokens.
        vision_busy_s: Seconds of encoding, of all servers together.
        language_busy_s: Seconds of steps, of all servers together.
    """

    arrivals: tuple[float, ...]
    tokens: tuple[tuple[float, ...], ...]
    vision_busy_s: float
    language_busy_s: float

    @property
    def requests_per_s(self) -> float:
        """Requests over the time from the first arrival to the last end, as load tests say it."""
        return len(self.tokens) / (max(each[-1] for each in self.tokens) - self.arrivals[0])

    def first_token_s(self, quantile: float) -> float:
        """A quantile of the time to the first token."""
        waits = [each[0] - at for at, each in zip(self.arrivals, self.tokens, strict=True)]
        return float(np.quantile(waits, quantile))

    def token_s(self, quantile: float) -> float:
        """A quantile of the time from token to token; not a number if answers have one token."""
        gaps = [after - before for each in self.tokens for before, after in pairwise(each)]
        return float(np.quantile(gaps, quantile)) if gaps else math.nan


@dataclass(slots=True, eq=False)
class _Request:
    arrival: float
    read: int = 0
    tokens: list[float] = field(default_factory=list)


def simulate(
    service: Service, ask: Ask, layout: Layout, load: Load, policy: Policy | None = None
) -> Run:
    """Send requests to servers, and see when they are answered.

    Args:
        service: How long things take.
        ask: What each request brings and wants.
        layout: Which servers there are.
        load: How requests come.
        policy: How much is computed at once.
    """
    env = simpy.Environment()
    world = _World(env, service, ask, policy or Policy())
    languages = [_LanguageServer(world) for _ in range(layout.language)]
    visions = [_VisionServer(world) for _ in range(layout.vision)]
    requests: list[_Request] = []
    env.process(_arrive(world, load, languages, visions, requests))
    env.run()
    return Run(
        tuple(request.arrival for request in requests),
        tuple(tuple(request.tokens) for request in requests),
        world.vision_busy_s,
        world.language_busy_s,
    )


@dataclass(slots=True, eq=False)
class _World:
    """What all servers share."""

    env: simpy.Environment
    service: Service
    ask: Ask
    policy: Policy
    vision_busy_s: float = 0.0
    language_busy_s: float = 0.0


def _arrive(
    world: _World,
    load: Load,
    languages: Sequence[_LanguageServer],
    visions: Sequence[_VisionServer],
    requests: list[_Request],
) -> _Events:
    """Requests come; each goes to the servers that have the least to do."""
    for gap in load.gaps():
        yield world.env.timeout(gap)
        request = _Request(world.env.now)
        requests.append(request)
        language = min(languages, key=lambda server: server.num_open)
        language.num_open += 1
        if not world.ask.tiles:
            language.read(request)
        elif visions:
            min(visions, key=lambda server: server.num_open).encode(request, language)
        else:
            language.encode(request)


class _Server:
    """Sleeps while it has nothing to do."""

    def __init__(self, world: _World) -> None:
        self.world, self.env = world, world.env
        self.num_open = 0
        self._idle: simpy.Event | None = None

    def _rouse(self) -> None:
        if self._idle is not None:
            self._idle.succeed()
            self._idle = None

    def _sleep(self) -> simpy.Event:
        self._idle = self.env.event()
        return self._idle

    def _encoding(self, queue: deque[_Request]) -> Generator[simpy.Event, Any, list[_Request]]:
        """Encode the tiles of one request, or of several that make no more than a batch."""
        tiles = self.world.ask.tiles
        number = max(1, min(len(queue), self.world.policy.max_batch_tiles // tiles))
        batch = [queue.popleft() for _ in range(number)]
        seconds = self.world.service.encode_s(number * tiles)
        self.world.vision_busy_s += seconds
        yield self.env.timeout(seconds)
        return batch


class _VisionServer(_Server):
    """Encodes, and sends while it encodes the next."""

    def __init__(self, world: _World) -> None:
        super().__init__(world)
        self._queue: deque[_Request] = deque()
        self._owners: dict[int, _LanguageServer] = {}
        self._link = simpy.Resource(self.env, capacity=1)
        self.env.process(self._run())

    def encode(self, request: _Request, language: _LanguageServer) -> None:
        """Take the tiles of a request."""
        self.num_open += 1
        self._queue.append(request)
        self._owners[id(request)] = language
        self._rouse()

    def _run(self) -> _Events:
        while True:
            while not self._queue:
                yield self._sleep()
            batch = yield from self._encoding(self._queue)
            for request in batch:
                self.env.process(self._send(request))

    def _send(self, request: _Request) -> _Events:
        with self._link.request() as turn:
            yield turn
            yield self.env.timeout(self.world.service.transfer_s())
        self.num_open -= 1
        self._owners.pop(id(request)).read(request)


class _LanguageServer(_Server):
    """Reads prompts and answers them; encodes as well where nobody else does."""

    def __init__(self, world: _World) -> None:
        super().__init__(world)
        self._pictures: deque[_Request] = deque()
        self._prompts: deque[_Request] = deque()
        self._running: list[_Request] = []
        self.env.process(self._run())

    def encode(self, request: _Request) -> None:
        """Take a request whose tiles are not encoded."""
        self._pictures.append(request)
        self._rouse()

    def read(self, request: _Request) -> None:
        """Take a request whose visual tokens are there."""
        self._prompts.append(request)
        self._rouse()

    def _run(self) -> _Events:
        enough = self.world.policy.max_step_tokens
        while True:
            if self._pictures and len(self._prompts) * self.world.ask.prompt_tokens < enough:
                encoded = yield from self._encoding(self._pictures)
                self._prompts.extend(encoded)
            if self._prompts or self._running:
                yield from self._step()
            elif not self._pictures:
                yield self._sleep()

    def _step(self) -> _Events:
        """Give every running answer a token, and read prompts with what is left of the step."""
        ask = self.world.ask
        running = list(self._running)
        chunks = self._chunks()
        ends = [request for request, stop in chunks if stop == ask.prompt_tokens]
        step = Step(
            prompt_tokens=sum(stop - request.read for request, stop in chunks),
            prompt_pairs=sum(_pairs(request.read, stop) for request, stop in chunks),
            first_tokens=len(ends),
            answers=len(running),
            context_tokens=sum(ask.prompt_tokens + len(each.tokens) for each in running),
        )
        seconds = self.world.service.step_s(step)
        self.world.language_busy_s += seconds
        yield self.env.timeout(seconds)
        for request, stop in chunks:
            request.read = stop
        for _ in ends:
            self._running.append(self._prompts.popleft())
        for request in (*running, *ends):
            request.tokens.append(self.env.now)
        self.num_open -= sum(len(each.tokens) == ask.new_tokens for each in self._running)
        self._running = [each for each in self._running if len(each.tokens) < ask.new_tokens]

    def _chunks(self) -> list[tuple[_Request, int]]:
        """Prompts that a step reads on, and up to which of their tokens."""
        policy, ask = self.world.policy, self.world.ask
        left = policy.max_step_tokens - len(self._running)
        chunks = []
        for request in islice(self._prompts, policy.max_running - len(self._running)):
            if left <= 0:
                break
            stop = min(ask.prompt_tokens, request.read + left)
            left -= stop - request.read
            chunks.append((request, stop))
        return chunks


def _pairs(start: int, stop: int) -> int:
    """Queries and keys of tokens that see all before them and themselves."""
    return (stop * (stop + 1) - start * (start + 1)) // 2
