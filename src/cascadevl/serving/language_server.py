"""The language half as a server: prompts and visual features in, tokens out.

The third stage of the pipeline is computed beside it, by an engine in its own thread or a server of
another program, while the next features come in. Every vision server has a window: so many bytes of
features that it may send ahead. What a request took of it is given back when the request's prompt
has been read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import zmq
from jaxtyping import Float, Int
from torch import Tensor

from cascadevl.engine.requests import (
    Completion,
    EngineStats,
    ImageFeatures,
    PromptPart,
    Request,
    TextIds,
    TokenOutput,
)
from cascadevl.errors import CascadeVLError, RequestError, ServerError
from cascadevl.serving.engine_thread import Output
from cascadevl.serving.member import Member
from cascadevl.serving.wire import (
    Accepted,
    Ask,
    Credit,
    Drop,
    Features,
    Link,
    Open,
    Parcel,
    Pulse,
    Received,
    Refused,
    Said,
    Who,
    fault_of,
    features_of,
    ids_of,
)
from cascadevl.types import VisualFeatures

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Job:
    """A request.

    Attributes:
        ask: What is asked.
        ids: Token ids, one slot a picture.
        task: Answers it, once all of it is there.
        owed: Bytes of credit to be given back.
        owed_to: Whom they belong to.
    """

    ask: Ask
    ids: Int[np.ndarray, " slots"]
    task: asyncio.Task[None] | None = None
    owed: int = 0
    owed_to: bytes = b""


@runtime_checkable
class Answerer(Protocol):
    """Who computes the answers: an engine in a thread, or a server of another program."""

    def ask(self, request: Request) -> AsyncGenerator[Output, None]:
        """Answer a request, see `cascadevl.serving.engine_thread.Answers.ask`."""
        ...

    def stats(self) -> EngineStats:
        """What is held, and has been done so far."""
        ...

    def close(self) -> None:
        """Stop; what is open ends with an error."""
        ...


class LanguageServer(Member):
    """Answers requests whose pictures were encoded elsewhere."""

    def __init__(
        self,
        answers: Answerer,
        front: str,
        features_at: str,
        *,
        image_token_id: int,
        weights: str = "",
        window_bytes: int = 2**28,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        """Bind whoever computes the answers.

        Args:
            answers: Computes them; is closed with this server.
            front: Where the front is.
            features_at: Where features are taken.
            image_token_id: Marks the place of a picture.
            weights: Which weights these are; servers of others cannot join the same front.
            window_bytes: Features that each vision server may send ahead.
            context: Of the process, where the front is in the same.
        """
        super().__init__("language", front, weights=weights, context=context)
        self._answers = answers
        self._image_token_id = image_token_id
        self._bind_at, self._features_at = features_at, ""
        self._features = Link(self.context)
        self._window_bytes = window_bytes
        self._jobs: dict[int, _Job] = {}
        self._said: list[Output] = []
        self._has_said = asyncio.Event()

    @property
    def features_at(self) -> str:
        """Where features are taken."""
        return self._features_at

    def stats(self) -> EngineStats:
        """What the engine holds, and has done."""
        return self._answers.stats()

    def open(self) -> None:
        """Take features."""
        self._features_at = self._features.bind(self._bind_at)

    def tasks(self) -> list[Coroutine[Any, Any, None]]:
        """What is done at the same time."""
        return [*super().tasks(), self._take_features()]

    async def work(self) -> None:
        """Tell the front what the engine says; what has come together goes together."""
        while True:
            await self._has_said.wait()
            self._has_said.clear()
            said, self._said = self._said, []
            tokens = tuple(each for each in said if isinstance(each, TokenOutput))
            completions = tuple(each for each in said if isinstance(each, Completion))
            await self.front.send(Said(tokens, completions))

    async def take(self, parcel: Parcel) -> None:
        """Take a message of the front."""
        match parcel.message:
            case Ask() as ask:
                await self._drop(ask.request)
                job = self._jobs[ask.request] = _Job(ask, ids_of(parcel.frames[0]).copy())
                if ask.tiles_per_image:
                    await self.front.send(Accepted(ask.request))
                else:
                    self._begin(job, ())
            case Drop(request):
                await self._drop(request)
            case _:
                self.surprised(parcel)

    async def reset(self) -> None:
        """Forget all requests: the front will ask again."""
        for request in list(self._jobs):
            await self._drop(request)
        self._said.clear()

    async def _drop(self, request: int) -> None:
        job = self._jobs.pop(request, None)
        if job is not None:
            await self._give_back(job)
            if job.task is not None:
                job.task.cancel()

    def close(self) -> None:
        """Let go of everything."""
        for job in self._jobs.values():
            if job.task is not None:
                job.task.cancel()
        self._answers.close()
        self._features.close()
        super().close()

    async def _take_features(self) -> None:
        while True:
            try:
                parcel = await self._features.receive()
                if parcel.is_torn:
                    await self._features.send(Who(), to=parcel.sender)
                    continue
                match parcel.message:
                    case Pulse():
                        await self._features.send(Pulse(), to=parcel.sender)
                    case Open():
                        await self._features.send(Credit(self._window_bytes), to=parcel.sender)
                    case Features() as message:
                        await self._feed(message, parcel)
                    case _:
                        self.surprised(parcel)
            except ServerError as error:
                _LOG.warning("%s: %s", self.name, error)

    async def _feed(self, message: Features, parcel: Parcel) -> None:
        """Give a request its features, if it still waits for them."""
        num_bytes = len(parcel.frames[0])
        job = self._jobs.get(message.request)
        if job is None or job.task is not None:
            await self._features.send(Credit(num_bytes), to=parcel.sender)
            return
        tiles = iter(features_of(message, parcel.frames[0]))
        job.owed, job.owed_to = num_bytes, parcel.sender
        await self.front.send(Received(message.request))
        pictures = [picture_of(list(islice(tiles, count))) for count in job.ask.tiles_per_image]
        self._begin(job, pictures)

    def _begin(self, job: _Job, pictures: Sequence[ImageFeatures]) -> None:
        job.task = asyncio.ensure_future(self._answer(job, pictures))

    async def _answer(self, job: _Job, pictures: Sequence[ImageFeatures]) -> None:
        """Answer a request to its end."""
        ask = job.ask
        try:
            request = Request(
                prompt=prompt_parts(job.ids, pictures, self._image_token_id),
                sampling=ask.sampling,
                num_samples=ask.num_samples,
                increments=ask.increments,
                stream=ask.stream,
                thinking_budget=ask.thinking_budget,
            )
            async with aclosing(self._answers.ask(request)) as outputs:
                async for output in outputs:
                    await self._give_back(job)
                    self._said.append(replace(output, request_id=ask.request))
                    self._has_said.set()
        except CascadeVLError as error:
            await self.front.send(Refused(ask.request, str(error), fault_of(error)))
        await self._give_back(job)
        if self._jobs.get(ask.request) is job:
            del self._jobs[ask.request]

    async def _give_back(self, job: _Job) -> None:
        """Give the credit of a request back: its prompt has been read, or nobody wants it."""
        if job.owed:
            owed, job.owed = job.owed, 0
            await self._features.send(Credit(owed), to=job.owed_to)


def picture_of(tiles: Sequence[Float[Tensor, "_ hidden"]]) -> ImageFeatures:
    """A picture of tiles, of which a router may have given some fewer visual tokens.

    Args:
        tiles: The visual tokens of each, in order.
    """
    runs = [list(run) for _, run in groupby(tiles, key=len)]
    return ImageFeatures(tuple(VisualFeatures(projected=torch.stack(run)) for run in runs))


def prompt_parts(
    ids: Int[np.ndarray, " slots"], pictures: Sequence[ImageFeatures], image_token_id: int
) -> tuple[PromptPart, ...]:
    """A prompt in parts: the text between its slots, and the features of its pictures.

    Args:
        ids: Token ids, one slot a picture.
        pictures: Features of each.
        image_token_id: Marks a slot.

    Raises:
        RequestError: If slots and pictures differ in number.
    """
    slots = np.flatnonzero(ids == image_token_id).tolist()
    if len(slots) != len(pictures):
        raise RequestError(f"the prompt has {len(slots)} slots for {len(pictures)} pictures")
    parts: list[PromptPart] = []
    start = 0
    for slot, picture in zip(slots, pictures, strict=True):
        if slot > start:
            parts.append(TextIds(tuple(ids[start:slot].tolist())))
        parts.append(picture)
        start = slot + 1
    if start < len(ids):
        parts.append(TextIds(tuple(ids[start:].tolist())))
    return tuple(parts)
