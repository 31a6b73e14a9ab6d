"""What vision and language servers have in common: they join a front, and join it again."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import zmq

from cascadevl.engine.requests import EngineStats
from cascadevl.errors import ServerError
from cascadevl.serving.wire import Beat, Hello, Link, Parcel, Pulse, Role, Who

BEAT_S = 0.5
"""A server says that it is alive so often."""

_LOG = logging.getLogger(__name__)
_EDGE_BYTES = 2**20


class Member(ABC):
    """A server that works for a front. It may start before the front, and outlive it.

    Attributes:
        name: Of this start of the server; another start is somebody else.
        front: The way to the front.
        context: Makes sockets.
    """

    front: Link

    def __init__(
        self, role: Role, front: str, *, weights: str, context: zmq.Context[Any] | None
    ) -> None:
        """Know where the front is; nothing is opened before `run`.

        Args:
            role: Which half this is.
            front: Where the front is.
            weights: Which weights these are.
            context: Of the process; None for one of its own.
        """
        self.name = f"{role}-{secrets.token_hex(8)}"
        self._role, self._front_at, self._weights = role, front, weights
        self._owns_context = context is None
        self.context: zmq.Context[Any] = context or zmq.Context()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = threading.Event()
        self._main: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Work until `stop` is called."""
        self._loop = asyncio.get_running_loop()
        self.front = Link(self.context, name=self.name)
        self._main = asyncio.ensure_future(self._run())
        if self._stopping.is_set():
            self._main.cancel()
        try:
            await self._main
        except asyncio.CancelledError:
            if not self._stopping.is_set():
                raise
        finally:
            self.close()

    def stop(self) -> None:
        """Stop working; may be called from any thread."""
        self._stopping.set()
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._main is not None:
            self._main.cancel()

    async def _run(self) -> None:
        self.front.connect(self._front_at)
        self.open()
        await self._hello()
        async with asyncio.TaskGroup() as group:
            for each in self.tasks():
                group.create_task(each)

    def open(self) -> None:  # noqa: B027  # a vision server has nothing to open
        """Open what the front is told of."""

    def tasks(self) -> list[Coroutine[Any, Any, None]]:
        """What is done at the same time."""
        return [self._listen(), self._beat(), self.work()]

    @property
    def features_at(self) -> str:
        """Where features are taken; empty if nowhere."""
        return ""

    @abstractmethod
    async def work(self) -> None:
        """The server's own work."""

    @abstractmethod
    async def take(self, parcel: Parcel) -> None:
        """Take a message of the front."""

    @abstractmethod
    async def reset(self) -> None:
        """Forget all requests: the front will ask again."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """What is held, and has been done."""

    def close(self) -> None:
        """Let go of everything."""
        self.front.close()
        if self._owns_context:
            self.context.destroy(linger=0)

    def surprised(self, parcel: Parcel) -> None:
        """Note a message that nobody should send here."""
        _LOG.warning("%s: %s is not for me", self.name, type(parcel.message).__name__)

    async def _hello(self) -> None:
        """Join; what was asked before counts no more, so that nothing is said twice."""
        await self.reset()
        await self.front.send(Hello(self._role, self.features_at, self._weights))

    async def _listen(self) -> None:
        while True:
            try:
                parcel = await self.front.receive()
                if isinstance(parcel.message, Who) or parcel.is_torn:
                    await self._hello()  # the front is another one, or something was lost
                elif not isinstance(parcel.message, Pulse):
                    await self.take(parcel)
            except ServerError as error:
                _LOG.warning("%s: %s", self.name, error)

    async def _beat(self) -> None:
        while True:
            await self.front.send(Beat(self.stats()))
            await asyncio.sleep(BEAT_S)


class MemberThread:
    """A member in a thread of its own, beside its front in one process."""

    def __init__(self, member: Member) -> None:
        """Start it.

        Args:
            member: Works until `close`.
        """
        self._member = member
        self._thread = threading.Thread(target=self._run, name=member.name, daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """The member's name."""
        return self._member.name

    @property
    def is_alive(self) -> bool:
        """Whether it works."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop it, and wait until it has stopped."""
        self._member.stop()
        self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._member.run())


def fingerprint(folder: Path) -> str:
    """Which weights a checkpoint holds: the same for equal files, wherever they are.

    Of every file, its size, beginning and end are looked at, so that it takes no time.

    Args:
        folder: Of the checkpoint.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        size = file.stat().st_size
        with file.open("rb") as content:
            digest.update(f"{file.name} {size}\n".encode())
            digest.update(content.read(_EDGE_BYTES))
            content.seek(max(0, size - _EDGE_BYTES))
            digest.update(content.read(_EDGE_BYTES))
    return digest.hexdigest()
