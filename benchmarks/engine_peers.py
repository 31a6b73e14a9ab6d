"""Who is timed by bench_engine.py: the engine, and transformers' generate at its best setting."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration, StoppingCriteria, StoppingCriteriaList

from cascadevl.data.tiling import normalise
from cascadevl.engine.backends import generate
from cascadevl.engine.engine import Engine
from cascadevl.engine.http_json import HttpServer
from cascadevl.engine.packed_weights import Precision, pack
from cascadevl.engine.requests import EngineConfig, ImageTiles, Request, TextIds
from cascadevl.engine.sampling import SamplingParams
from cascadevl.engine.vllm import connect
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.vision_half import load_vision_half


class Shape(Protocol):
    """What a case is made of; see `bench_engine.Row`."""

    text_tokens: int
    num_tiles: int
    num_prompts: int
    num_samples: int
    new_tokens: int
    asked_before: bool
    measure: str


@dataclass(frozen=True, slots=True)
class Timing:
    """What is noted of a case.

    Attributes:
        first_s: Seconds until every answer had its first token.
        whole_s: Seconds until all had ended.
        later: Tokens that came in between: answers that began earlier were then further on.
    """

    first_s: float
    whole_s: float
    later: int


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Prompts: some text, a picture, the question.

    Attributes:
        before: Text before the picture, of each prompt.
        pictures: The pictures.
        questions: The text behind them.
        before_that: Questions about the same pictures, to be asked before; empty for none.
        num_samples: Answers of each prompt.
        new_tokens: Length of every answer.
        image_token_id: Stands for a visual token.
        tokens_per_tile: Visual tokens of a tile.
    """

    before: list[tuple[int, ...]]
    pictures: list[np.ndarray]
    questions: list[tuple[int, ...]]
    before_that: list[tuple[int, ...]]
    num_samples: int
    new_tokens: int
    image_token_id: int
    tokens_per_tile: int

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of one prompt."""
        visual = len(self.pictures[0]) * self.tokens_per_tile
        return len(self.before[0]) + visual + len(self.questions[0])

    @property
    def image_px(self) -> int:
        """Side of a tile."""
        return int(self.pictures[0].shape[1])

    def input_ids(self) -> Tensor:
        """Prompts as transformers takes them."""
        rows = [
            [*before, *[self.image_token_id] * len(tiles) * self.tokens_per_tile, *question]
            for before, tiles, question in zip(
                self.before, self.pictures, self.questions, strict=True
            )
        ]
        return torch.tensor(rows)

    def pixel_values(self, dtype: torch.dtype) -> Tensor:
        """Pictures as transformers takes them."""
        return normalise(np.concatenate(self.pictures)).to(dtype)

    def requests(self, sampling: SamplingParams, *, before: bool = False) -> list[Request]:
        """The same for the engine; or what is asked before."""
        texts = self.before_that if before else self.questions
        return [
            Request(
                prompt=(TextIds(before), ImageTiles(tiles), TextIds(text)),
                sampling=sampling,
                num_samples=1 if before else self.num_samples,
                stream=True,
            )
            for before, tiles, text in zip(self.before, self.pictures, texts, strict=bool(texts))
        ]


def make_case(row: Shape, model: CascadeVLForConditionalGeneration, *, seed: int) -> Case:
    """Random prompts and pictures; another seed shares nothing with this one."""
    generator = np.random.default_rng(seed)
    config = model.config
    size = config.vision_config.image_size
    px = int(size[0] if isinstance(size, list | tuple) else size)
    low, high = 100, min(2000, int(config.text_config.vocab_size))
    ordinary = [token for token in range(low, high) if token != config.image_token_id]

    def texts(length: int) -> list[tuple[int, ...]]:
        return [tuple(generator.choice(ordinary, length).tolist()) for _ in range(row.num_prompts)]

    questions = texts(row.text_tokens - 5)
    # Where decoding is timed, all was read before: a server decodes some while it reads others.
    known = questions if row.measure == "rate" else []
    return Case(
        before=texts(5),
        pictures=[
            generator.integers(0, 255, (row.num_tiles, px, px, 3), dtype=np.uint8)
            for _ in range(row.num_prompts)
        ],
        questions=questions,
        before_that=texts(row.text_tokens - 5) if row.asked_before else known,
        num_samples=row.num_samples,
        new_tokens=row.new_tokens,
        image_token_id=config.image_token_id,
        tokens_per_tile=model.tokens_per_tile,
    )


class Peer(Protocol):
    """Whoever is timed."""

    def time(self, case: Case) -> Timing:
        """Answer all prompts of a case."""
        ...


class Ours:
    """The engine, which runs on from case to case as a server does; cases share nothing."""

    def __init__(
        self, model: CascadeVLForConditionalGeneration, precision: Precision | None = None
    ) -> None:
        """Pack the weights, if asked to."""
        model = model if precision is None else pack(model, precision).model
        self.engine = Engine(model, config=EngineConfig())

    def time(self, case: Case) -> Timing:
        """Answer all prompts of a case."""
        engine = self.engine
        drawn = 1.0 if case.num_samples > 1 else 0.0
        how = SamplingParams(temperature=drawn, max_tokens=case.new_tokens, ignore_eos=True)
        one = SamplingParams(max_tokens=1, ignore_eos=True)
        if case.before_that:
            engine.generate(case.requests(one, before=True))
        wanted = len(case.questions) * case.num_samples
        requests = case.requests(how)
        start = time.perf_counter()
        for request in requests:
            engine.add(request)
        seen: set[tuple[int, int]] = set()
        first = 0.0
        tokens = early = 0
        while not engine.is_idle:
            result = engine.step()
            tokens += len(result.tokens)
            if len(seen) < wanted:
                seen |= {(token.request_id, token.sample) for token in result.tokens}
                first, early = time.perf_counter() - start, tokens
        ended = time.perf_counter() - start
        assert tokens == wanted * case.new_tokens
        return Timing(first, ended, tokens - early)


class _Clock(StoppingCriteria):
    """Notes when the first token was there; stops nothing."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if self.first is None:
            self.first = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Transformers:
    """`InternVLForConditionalGeneration.generate` with the very same weights."""

    def __init__(
        self, model: CascadeVLForConditionalGeneration, attention: str, cache: str
    ) -> None:
        """Build the peer around our tensors; the settings are its own, as attention is one."""
        with torch.device("meta"):
            self.model = InternVLForConditionalGeneration._from_config(
                copy.deepcopy(model.config), attn_implementation=attention, dtype=model.dtype
            )
        self.model.load_state_dict(model.state_dict(), assign=True)
        # Buffers that are no part of a state, above all the rotary frequencies.
        ours = dict(model.named_buffers())
        for name, module in self.model.named_modules():
            for buffer in list(module._buffers):
                module._buffers[buffer] = ours[f"{name}.{buffer}"]
        self.model.eval()
        self.cache = cache

    def tokens(self, case: Case) -> Tensor:
        """Greedy answers, one of each prompt."""
        return self._generate(case, _Clock(), draw=False)

    def time(self, case: Case) -> Timing:
        """Answer all prompts of a case."""
        clock, start = _Clock(), time.perf_counter()
        found = self._generate(case, clock, draw=case.num_samples > 1)
        assert found.shape == (len(case.questions) * case.num_samples, case.new_tokens)
        assert clock.first is not None
        later = found.shape[0] * (case.new_tokens - 1)
        return Timing(clock.first - start, time.perf_counter() - start, later)

    @torch.inference_mode()
    def _generate(self, case: Case, clock: _Clock, *, draw: bool) -> Tensor:
        ids = case.input_ids()
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=case.pixel_values(self.model.dtype),
            max_new_tokens=case.new_tokens,
            min_new_tokens=case.new_tokens,
            do_sample=draw,
            num_return_sequences=case.num_samples if draw else 1,
            cache_implementation=self.cache,
            stopping_criteria=StoppingCriteriaList([clock]),
            eos_token_id=None,
            pad_token_id=0,
        )
        return output[:, ids.shape[1] :]


class Elsewhere:
    """A peer in a process of its own, which manages its memory as the C library does by default."""

    def __init__(self, make: Callable[[], Peer]) -> None:
        """Start the process.

        Args:
            make: Makes the peer there; must cross process borders.
        """
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        process = context.Process(target=_answer_cases, args=(theirs, make), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is seen here

    def time(self, case: Case) -> Timing:
        """Answer all prompts of a case."""
        self._ours.send(case)
        timing = self._ours.recv()
        assert isinstance(timing, Timing)
        return timing

    def close(self) -> None:
        """Let the process end."""
        self._ours.close()


def _answer_cases(cases: Connection, make: Callable[[], Peer]) -> None:
    """What the process does, until nobody asks any more."""
    peer = make()
    while True:
        try:
            case = cases.recv()
        except EOFError:
            return
        cases.send(peer.time(case))


class Vllm:
    """A running vLLM server of the language half; this process encodes the pictures."""

    def __init__(self, url: str, checkpoint: Path) -> None:
        """Connect.

        Args:
            url: Base address of the server, ending in ``/v1``.
            checkpoint: What the server's language half was exported from.
        """
        self.backend = connect(*load_vision_half(checkpoint), HttpServer(url=url))

    def time(self, case: Case) -> Timing:
        """Answer all prompts of a case, all asked at once."""
        drawn = 1.0 if case.num_samples > 1 else 0.0
        how = SamplingParams(temperature=drawn, max_tokens=case.new_tokens, ignore_eos=True)
        one = SamplingParams(max_tokens=1, ignore_eos=True)
        if case.before_that:
            generate(self.backend, case.requests(one, before=True))
        start = time.perf_counter()
        times: dict[tuple[int, int], list[float]] = {}

        async def listen(number: int, request: Request) -> None:
            async for token in self.backend.stream(request):
                mine = times.setdefault((number, token.sample), [])
                mine.append(time.perf_counter() - start)

        async def all_of_them() -> None:
            requests = enumerate(case.requests(how))
            await asyncio.gather(*(listen(*each) for each in requests))

        asyncio.run(all_of_them())
        whole = time.perf_counter() - start
        assert len(times) == case.num_samples * len(case.questions)
        assert all(len(mine) == case.new_tokens for mine in times.values())
        first = max(mine[0] for mine in times.values())
        return Timing(first, whole, sum(t > first for mine in times.values() for t in mine))


def peer_sweep(
    model: CascadeVLForConditionalGeneration,
    case: Case,
    make: Callable[[CascadeVLForConditionalGeneration, str, str], Transformers],
) -> tuple[Transformers, tuple[str, str], dict[str, float]]:
    """Transformers at the quickest of its settings, which those are, and the seconds of each."""
    seconds: dict[str, float] = {}
    best: tuple[float, Transformers, tuple[str, str]] | None = None
    for attention in ("sdpa", "eager"):
        for cache in ("dynamic", "static"):
            peer = make(model, attention, cache)
            took = peer.time(case).whole_s
            seconds[f"{attention}, {cache} cache"] = took
            if best is None or took < best[0]:
                best = (took, peer, (attention, cache))
    assert best is not None
    return best[1], best[2], seconds
