"""The engine in a thread of its own, asked from event loops that never wait for it.

One thread steps the engine while anybody waits for an answer. What a step brings is handed to the
event loops of those who asked; a loop whose client went away calls the request off.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import Completion, EngineStats, Request, TokenOutput
from cascadevl.errors import CascadeVLError, LogitsError, ServerError, UnavailableError

Output: TypeAlias = TokenOutput | Completion
"""A token of a streamed answer, or an answer that has ended."""


@runtime_checkable
class Answers(Protocol):
    """Whoever answers the requests that come over HTTP."""

    def ask(self, request: Request) -> AsyncGenerator[Output, None]:
        """Answer a request; closing the iterator calls it off.

        Args:
            request: What is asked. Its tokens come as they are drawn if it wants a stream, and
                every answer as it ends.

        Raises:
            RequestError: If it can never be answered.
            ServerError: If it was given up without being its fault.
        """
        ...

    async def start(self) -> None:
        """Begin; called once, in the event loop that will ask."""
        ...

    async def stop(self) -> None:
        """End; what is open ends with an error."""
        ...

    def stats(self) -> EngineStats:
        """What is held, and has been done so far."""
        ...

    @property
    def unready(self) -> str | None:
        """What is missing for the moment, or None while nothing is."""
        ...

    @property
    def failure(self) -> str | None:
        """Why nothing is answered any more, or None while all is well."""
        ...


@dataclass(slots=True, eq=False)
class _Waiter:
    """Whoever waits for the answers to one request.

    Attributes:
        loop: Where it waits.
        left: Answers that have not ended.
        outputs: What has come for it.
        number: Of the request, once the engine has it.
        is_gone: Whether it waits no more.
    """

    loop: asyncio.AbstractEventLoop
    left: int
    outputs: asyncio.Queue[Output | CascadeVLError] = field(default_factory=asyncio.Queue)
    number: int | None = None
    is_gone: bool = False


_Handed: TypeAlias = list[tuple[_Waiter, Output | CascadeVLError]]


class EngineThread:
    """Steps an engine for all who ask; nobody else may step it.

    A step that fails (no memory, a broken grammar) ends what was open with an error; the engine
    goes on with what comes next.
    """

    def __init__(self, engine: Engine, *, num_adding: int = 2) -> None:
        """Start the thread.

        Args:
            engine: The engine.
            num_adding: Threads that read requests and their schemas before the engine has them.
        """
        self.engine = engine
        self._lock = threading.Lock()  # guards the next two, and whether a waiter is gone
        self._waiters: dict[int, _Waiter] = {}
        self._early: dict[int, list[Output]] = {}  # came before its waiter knew its number
        self._wake = threading.Event()
        self._is_closing = False
        self._failure: str | None = None
        self._adding = ThreadPoolExecutor(num_adding, thread_name_prefix="add")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """Why nothing is answered any more."""
        if self._failure is None and not self._thread.is_alive():
            return "the engine was stopped"
        return self._failure

    @property
    def unready(self) -> str | None:
        """Nothing is ever missing."""
        return None

    async def start(self) -> None:
        """Do nothing: the thread runs already."""

    async def stop(self) -> None:
        """Stop, see `close`."""
        await asyncio.to_thread(self.close)

    def stats(self) -> EngineStats:
        """What the engine holds, and has done so far."""
        return self.engine.stats()

    async def ask(self, request: Request) -> AsyncGenerator[Output, None]:
        """Answer a request, see `Answers.ask`."""
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop, request.num_samples)
        try:
            await loop.run_in_executor(self._adding, self._enter, request, waiter)
            num_left = request.num_samples
            while num_left:
                output = await waiter.outputs.get()
                if isinstance(output, CascadeVLError):
                    raise output
                num_left -= isinstance(output, Completion)
                yield output
        finally:
            self._leave(waiter)

    def close(self) -> None:
        """Stop; what is open ends with an error."""
        self._is_closing = True
        self._wake.set()
        self._thread.join()
        self._adding.shutdown(wait=True)
        self._fail(shutting_down())

    def _enter(self, request: Request, waiter: _Waiter) -> None:
        """Give the engine a request; its waiter may be gone by the time the engine has it."""
        if (failure := self.failure) is not None:
            raise ServerError(f"nothing is answered any more: {failure}")
        number = self.engine.add(request)
        with self._lock:
            waiter.number = number
            self._waiters[number] = waiter
            handed: _Handed = []
            self._note(number, self._early.pop(number, ()), handed)
            is_gone = waiter.is_gone
        _hand(handed)
        if is_gone:
            self.engine.cancel(number)
        self._wake.set()
        if (failure := self.failure) is not None:  # it stopped before it could see the request
            raise ServerError(f"nothing is answered any more: {failure}")

    def _leave(self, waiter: _Waiter) -> None:
        with self._lock:
            waiter.is_gone = True
            is_open = waiter.number in self._waiters
        if is_open and waiter.number is not None:
            self.engine.cancel(waiter.number)
            self._wake.set()

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._wake.clear()
                if self.engine.is_idle and not self._is_closing:
                    self._wake.wait()
                else:
                    self._step()
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error}"
            self._fail(ServerError(f"the engine has stopped ({self._failure}); start it again"))
            raise

    def _step(self) -> None:
        try:
            result = self.engine.step()
        except LogitsError:
            return  # those whose logits they are were given up, the next step says who
        except (CascadeVLError, RuntimeError, MemoryError) as error:
            self._fail(ServerError(f"a step of the engine failed, and the answer with it: {error}"))
            return
        outputs: dict[int, list[Output]] = {}
        said: list[Output] = [*result.tokens, *result.completions]
        for output in said:
            outputs.setdefault(output.request_id, []).append(output)
        handed: _Handed = []
        with self._lock:
            for number, mine in outputs.items():
                if number in self._waiters:
                    self._note(number, mine, handed)
                else:
                    self._early.setdefault(number, []).extend(mine)
        _hand(handed)

    def _note(self, number: int, outputs: Iterable[Output], handed: _Handed) -> None:
        """Find who waits for outputs; forget it with the last answer. Called with the lock."""
        waiter = self._waiters[number]
        for output in outputs:
            waiter.left -= isinstance(output, Completion)
            if waiter.is_gone:
                continue
            handed.append((waiter, _given_up() if output.finish_reason == "cancelled" else output))
        if waiter.left == 0:
            del self._waiters[number]

    def _fail(self, error: ServerError) -> None:
        """End all that is open."""
        with self._lock:
            open_waiters = [each for each in self._waiters.values() if not each.is_gone]
            for waiter in open_waiters:
                waiter.is_gone = True
        for waiter in open_waiters:
            assert waiter.number is not None
            self.engine.cancel(waiter.number)
        _hand([(waiter, error) for waiter in open_waiters])


def shutting_down() -> UnavailableError:
    """The error of what is open when answering ends."""
    return UnavailableError("the server is shutting down; ask again later")


def _given_up() -> ServerError:
    return ServerError(
        "the model's logits were not finite, so that its answer was given up; are its weights "
        "sound, and its type wide enough?"
    )


def _hand(handed: _Handed) -> None:
    """Put outputs where they are waited for, with one call for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, _Handed] = {}
    for waiter, output in handed:
        by_loop.setdefault(waiter.loop, []).append((waiter, output))
    for loop, mine in by_loop.items():
        with suppress(RuntimeError):  # the loop is closed: nobody waits there any more
            loop.call_soon_threadsafe(_put, mine)


def _put(handed: _Handed) -> None:
    for waiter, output in handed:
        waiter.outputs.put_nowait(output)
