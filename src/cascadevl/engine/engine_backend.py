"""Our engine as a backend."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from cascadevl.engine.backends import Capabilities, Outcome
from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import Completion, Request, TokenOutput
from cascadevl.errors import LogitsError, RequestError


@dataclass(slots=True, eq=False)
class _Open:
    """A request whose answers have not all come."""

    number: int
    num_samples: int
    answers: list[Completion] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineBackend:
    """Answers with an engine of this process.

    Attributes:
        engine: The engine, with a processor. Nobody else steps it while `answer` runs.
        max_waiting: Requests that wait within the engine while more are at hand; each holds its
            pictures.
    """

    engine: Engine
    max_waiting: int = 64

    @property
    def capabilities(self) -> Capabilities:
        """Everything."""
        return Capabilities(
            increments=True,
            logprobs=True,
            constrained=True,
            weight_refresh=True,
            thinking_budget=True,
        )

    def answer(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        """Answer requests together, see `Backend.answer`."""
        more = enumerate(requests)
        opened: dict[int, _Open] = {}
        try:
            while True:
                yield from self._take_in(more, opened)
                if not opened:
                    return
                for done in self._step():
                    open_request = opened[done.request_id]
                    open_request.answers.append(done)
                    if len(open_request.answers) == open_request.num_samples:
                        del opened[done.request_id]
                        yield open_request.number, _outcome(open_request.answers)
        finally:
            for request_id in opened:
                self.engine.cancel(request_id)

    async def stream(self, request: Request) -> AsyncIterator[TokenOutput]:
        """Answer one request token by token, see `Backend.stream`."""
        async for output in self.engine.astream(request):
            yield output

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take in new weights in place; what was computed with the old ones is forgotten."""
        self.engine.load(state)

    def _take_in(
        self, more: Iterator[tuple[int, Request]], opened: dict[int, _Open]
    ) -> Iterator[Outcome]:
        """Give the engine requests while it has room; those that it refuses are outcomes."""
        while self.engine.num_waiting < self.max_waiting:
            number, request = next(more, (None, None))
            if number is None or request is None:
                return
            try:
                request_id = self.engine.add(request)
            except RequestError as error:
                yield number, error
            else:
                opened[request_id] = _Open(number, request.num_samples)

    def _step(self) -> tuple[Completion, ...]:
        """Answers that a step ends; those that it gives up are cancelled with the next one."""
        try:
            return self.engine.step().completions
        except LogitsError:
            return ()


def _outcome(answers: list[Completion]) -> tuple[Completion, ...] | RequestError:
    if any(answer.finish_reason == "cancelled" for answer in answers):
        return RequestError(
            "the model's logits were not finite, so that its answer was given up; are its weights "
            "sound?"
        )
    return tuple(sorted(answers, key=lambda answer: answer.sample))
