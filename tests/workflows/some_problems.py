"""Questions and an engine with a small model, for tests of what is sampled."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.data.conftest import picture
from torch import Tensor

import cascadevl
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.backends import Capabilities, Outcome
from cascadevl.engine.engine import Engine
from cascadevl.engine.engine_backend import EngineBackend
from cascadevl.engine.requests import Completion, EngineConfig, Request, TokenOutput, Usage
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import DataError, RequestError
from cascadevl.tasks.problems import Problem
from cascadevl.types import ImageRef, Message

SAMPLING = SamplingParams(
    temperature=1.0, max_tokens=8, stop_token_ids=tuple(range(20, 60)), logprobs=0
)
"""Ends a good part of the answers of a small model with random weights."""


def is_even(text: str) -> bool:
    """Right about as often as wrong, whatever a model with random weights says."""
    return len(text) % 2 == 0


@dataclass(frozen=True)
class Sights:
    """Questions one a group, every other one with a drawn picture of several tiles."""

    number: int
    broken: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> list[Problem]:
        if index in self.broken:
            raise DataError("it is broken", kind="bad_field", source=f"sights:{index}")
        question = f"What is written on door {index}?"
        parts: tuple[Any, ...] = (question,)
        if index % 2:
            parts = (ImageRef(picture(90 + index, 60, seed=index)), f"\n{question}")
        return [
            Problem(
                problem_id=f"sight:{index:03}",
                prompt=Message("user", parts),
                reference=f"{index}",
                check=is_even,
                metric="exact",
            )
        ]

    def settings(self) -> dict[str, Any]:
        return {"sights": self.number}


def opened(folder: Path) -> tuple[EngineBackend, CascadeVLProcessor]:
    """An engine that gives the same answers, to the bit, whatever else it is asked."""
    model, processor = cascadevl.load(folder)
    config = EngineConfig(num_pages=400, page_tokens=8, batch_invariant=True)
    return EngineBackend(engine=Engine(model, processor, config), max_waiting=4), processor


class Killed(BaseException):
    """The process ends here."""


@dataclass
class Scripted:
    """Says what a script says to a request; remembers what was asked, and may come to an end."""

    says: Callable[[Request, int], str | RequestError]
    kill_after: int | None = None
    asked: list[Request] = field(default_factory=list)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(increments=True, logprobs=True, constrained=True, weight_refresh=True)

    def answer(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        for number, request in enumerate(requests):
            if len(self.asked) == self.kill_after:
                raise Killed
            self.asked.append(request)
            said = [self.says(request, sample) for sample in range(request.num_samples)]
            if isinstance(said[0], RequestError):
                yield number, said[0]
            else:
                yield number, tuple(map(completion, said))

    def stream(self, request: Request) -> AsyncIterator[TokenOutput]:
        raise NotImplementedError

    def load(self, state: Mapping[str, Tensor]) -> None:
        raise NotImplementedError


def completion(text: str | RequestError) -> Completion:
    assert isinstance(text, str)
    return Completion(
        request_id=0,
        sample=0,
        text=text,
        token_ids=(1, 2),
        finish_reason="stop",
        usage=Usage(prompt_tokens=1, visual_tokens=0, cached_tokens=0, completion_tokens=2),
    )
