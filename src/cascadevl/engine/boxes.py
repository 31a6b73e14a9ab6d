"""Whoever waits for answers of an engine that others use at the same time.

Each has a box into which every step puts what is theirs, and steps the engine while it is empty.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import replace
from typing import Protocol, TypeAlias, runtime_checkable

from cascadevl.engine.answers import OpenRequest
from cascadevl.engine.prompts import Prompt
from cascadevl.engine.requests import Completion, Request, StepResult, TokenOutput
from cascadevl.errors import LogitsError

Box: TypeAlias = deque[TokenOutput | Completion]

_AHEAD = 64
"""Requests that wait within the engine while more are at hand: each holds its pictures."""


@runtime_checkable
class Steps(Protocol):
    """What answers."""

    def add(self, request: Request) -> int:
        """Queue a request."""
        ...

    def cancel(self, request_id: int) -> None:
        """Call a request off."""
        ...

    def step(self) -> StepResult:
        """Compute a step of all requests."""
        ...

    def opened(self, request_id: int) -> OpenRequest:
        """What is known of a request that is not answered yet; it is kept up to date."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        ...


class TokenStream(Iterator[TokenOutput]):
    """The tokens of one request as they come. Read it to the end, or close it.

    Attributes:
        completions: Answers that have ended.
    """

    def __init__(self, boxes: Boxes, number: int, box: Box, num_samples: int) -> None:
        """Bind the box of a request."""
        self._asked = boxes.engine.opened(number)
        self.completions: list[Completion] = []
        self._boxes, self._number, self._box = boxes, number, box
        self._num_samples, self._is_closed = num_samples, False

    @property
    def prompt(self) -> Prompt:
        """What is read, once it is known how many tokens each tile has: waits for the router."""
        while self._asked.prompt.unrouted is not None and self._asked.num_left:
            self._boxes.engine.step()
        return self._asked.prompt

    def __next__(self) -> TokenOutput:
        """The next token, of whichever sample."""
        while not self._is_closed:
            while self._box:
                output = self._box.popleft()
                if isinstance(output, TokenOutput):
                    return output
                self.completions.append(output)
            if len(self.completions) == self._num_samples:
                self.close()
                break
            try:
                self._boxes.engine.step()
            except BaseException:
                self.close()
                raise
        raise StopIteration

    def close(self) -> None:
        """Call off what has not been answered; nothing more comes."""
        if not self._is_closed:
            self._is_closed = True
            self._boxes.leave(self._number)


class Boxes:
    """The boxes of all who wait."""

    def __init__(self, engine: Steps) -> None:
        """Begin with none."""
        self.engine = engine
        self._boxes: dict[int, Box] = {}
        self._stepping: asyncio.Future[StepResult] | None = None

    def deliver(self, result: StepResult) -> None:
        """Put what a step brought into the boxes of those who wait for it."""
        outputs: list[TokenOutput | Completion] = [*result.tokens, *result.completions]
        for output in outputs:
            box = self._boxes.get(output.request_id)
            if box is not None:
                box.append(output)

    def generate(self, requests: Iterable[Request]) -> list[tuple[Completion, ...]]:
        """All answers of all requests, in order; see `Engine.generate`."""
        answers: dict[int, list[Completion]] = {}
        left: dict[int, int] = {}
        more = iter(requests)
        try:
            while self._add_some(more, answers, left) or left:
                self.engine.step()
                for number in list(left):
                    self._empty(number, answers[number], left)
        finally:
            for number in left:
                self.leave(number)
        return [tuple(sorted(each, key=lambda c: c.sample)) for each in answers.values()]

    def stream(self, request: Request) -> TokenStream:
        """Tokens of one request; see `Engine.stream`."""
        number, box = self._enter(replace(request, stream=True))
        return TokenStream(self, number, box, request.num_samples)

    def astream(self, request: Request) -> AsyncIterator[TokenOutput]:
        """Tokens of one request for asyncio; see `Engine.astream`."""
        number, box = self._enter(replace(request, stream=True))
        return self._astreamed(number, box, request.num_samples)

    def _enter(self, request: Request) -> tuple[int, Box]:
        number = self.engine.add(request)
        self._boxes[number] = deque()
        return number, self._boxes[number]

    def leave(self, number: int) -> None:
        """Wait no more; the request is called off unless it has been answered."""
        del self._boxes[number]
        self.engine.cancel(number)

    def _add_some(
        self, more: Iterator[Request], answers: dict[int, list[Completion]], left: dict[int, int]
    ) -> bool:
        """Add requests while few wait; whether one was added."""
        added = False
        while self.engine.num_waiting < _AHEAD:
            request = next(more, None)
            if request is None:
                return added
            number, _ = self._enter(request)
            answers[number], left[number] = [], request.num_samples
            added = True
        return added

    def _empty(self, number: int, answers: list[Completion], left: dict[int, int]) -> None:
        box = self._boxes[number]
        while box:
            output = box.popleft()
            if isinstance(output, Completion):
                answers.append(output)
                left[number] -= 1
        if not left[number]:
            del left[number], self._boxes[number]

    async def _astreamed(self, number: int, box: Box, left: int) -> AsyncIterator[TokenOutput]:
        try:
            while left:
                while not box:
                    await self._step_in_thread(box)
                output = box.popleft()
                if isinstance(output, TokenOutput):
                    left -= output.finish_reason is not None
                    yield output
        finally:
            self.leave(number)

    async def _step_in_thread(self, box: Box) -> None:
        """Wait for the step being computed, or begin one; all who wait share it."""
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.ensure_future(asyncio.to_thread(self.engine.step))
        try:
            await asyncio.shield(self._stepping)
        except LogitsError:
            await asyncio.to_thread(self.engine.step)  # reports whose answers were given up
            if any(isinstance(o, TokenOutput) and o.finish_reason == "cancelled" for o in box):
                raise
