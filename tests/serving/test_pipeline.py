"""Two servers answer as one process does, to the bit, and nothing is held that nobody wants."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.small_talk import build, model_for, picture
from tests.serving.small_dvd import (
    DRAWN,
    INVARIANT,
    all_answers,
    all_of,
    answers_of,
    asked,
    by_engine,
    decoupled,
    facts,
    requests,
)

from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import Completion, Request, TextIds, TokenOutput
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import RequestError
from cascadevl.serving.coupled import Coupled
from cascadevl.serving.vision_server import VisionConfig
from cascadevl.types import ImageRef, Message

PROCESSOR = build()
MODEL = model_for(PROCESSOR, increment="auto", trained_context=200)

expected = partial(by_engine, MODEL, PROCESSOR)


def test_one_process_gives_the_answers_of_the_engine_to_the_bit():
    wishes = requests(PROCESSOR, num_samples=2, sampling=DRAWN)
    coupled = Coupled(Engine(MODEL, PROCESSOR, INVARIANT))
    assert facts(asyncio.run(asked(coupled, wishes))) == facts(expected(wishes))


def test_a_budget_of_reasoning_is_kept_wherever_the_language_half_is():
    ids = PROCESSOR.tokenizer("one two<think>\n", add_special_tokens=False).input_ids
    start = PROCESSOR.tokenizer("<think>\n", add_special_tokens=False).input_ids
    prompt = (TextIds(tuple(ids[: -len(start)])), TextIds(tuple(start)))
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    wishes = [Request(prompt=prompt, sampling=sampling, thinking_budget=n) for n in (None, 3)]
    coupled = Coupled(Engine(MODEL, PROCESSOR, INVARIANT))
    (free,), (held,) = asyncio.run(asked(coupled, wishes))
    assert facts([(free,), (held,)]) == facts(expected(wishes))
    assert held.token_ids[:3] == free.token_ids[:3]
    assert "</think>" in held.text
    assert "</think>" not in free.text


@pytest.mark.parametrize("address", [None, "tcp://127.0.0.1:0"], ids=["ipc", "tcp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_servers_give_them_too(address: str | None, dtype: Any, tmp_path: Path):
    model = model_for(PROCESSOR).to(dtype)
    wishes = requests(PROCESSOR, num_samples=2, sampling=DRAWN)

    async def ask() -> list[tuple[Completion, ...]]:
        async with decoupled(
            model,
            PROCESSOR,
            tmp_path,
            num_vision=2,
            num_language=2,
            engine=INVARIANT,
            address=address,
        ) as pipeline:
            return await all_answers(pipeline, wishes)

    assert facts(asyncio.run(ask())) == facts(by_engine(model, PROCESSOR, wishes))


def test_a_picture_is_encoded_once_and_tokens_stream(tmp_path: Path):
    wish = replace(requests(PROCESSOR)[0], stream=True)

    async def ask() -> tuple[Any, int]:
        async with decoupled(MODEL, PROCESSOR, tmp_path) as pipeline:
            outputs = [await all_of(pipeline, wish) for _ in range(3)]
            for _ in range(200):  # until the servers have told what they did
                await asyncio.sleep(0.1)
                if pipeline.stats().cached_tiles == 2 * len(wish.prompt.tiles):
                    break
            return outputs, pipeline.stats().encoded_tiles

    outputs, num_encoded = asyncio.run(ask())
    for each in outputs:
        *tokens, last = each
        ids = [token.token_id for token in tokens if isinstance(token, TokenOutput)]
        assert isinstance(last, Completion)
        assert tuple(ids) == last.token_ids
    assert len({tuple(each[-1].token_ids) for each in outputs}) == 1
    assert num_encoded == len(wish.prompt.tiles)


def test_what_can_never_be_answered_is_refused(tmp_path: Path):
    long = Request(
        prompt=PROCESSOR.prompt([Message.of("user", "one")]),
        sampling=SamplingParams(max_tokens=5000),
    )
    model = model_for(PROCESSOR)

    async def ask() -> None:
        async with decoupled(model, PROCESSOR, tmp_path) as pipeline:
            with pytest.raises(RequestError, match="pages"):
                await all_of(pipeline, long)
            assert len(await answers_of(pipeline, requests(PROCESSOR)[0])) == 1

    asyncio.run(ask())


def test_features_wait_for_credit_and_all_are_answered(tmp_path: Path):
    """A window smaller than any picture: one request's features are under way at a time."""
    pictures = [picture(seed, (60, 60)) for seed in range(12)]
    wishes = [
        Request(
            prompt=PROCESSOR.prompt([Message.of("user", ImageRef(each), "one")]),
            sampling=SamplingParams(max_tokens=5, ignore_eos=True),
        )
        for each in pictures
    ]

    async def ask() -> list[tuple[Completion, ...]]:
        async with decoupled(
            MODEL,
            PROCESSOR,
            tmp_path,
            engine=INVARIANT,
            vision=VisionConfig(max_batch_tiles=2, unsent_bytes=1000, batch_invariant=True),
            window_bytes=600,
        ) as pipeline:
            return await all_answers(pipeline, wishes)

    assert facts(asyncio.run(ask())) == facts(expected(wishes))


def test_whoever_leaves_calls_the_request_off_everywhere(tmp_path: Path):
    long = requests(PROCESSOR, stream=True, sampling={"max_tokens": 100})

    async def ask() -> None:
        async with decoupled(MODEL, PROCESSOR, tmp_path) as pipeline:
            for wish in long:
                async with aclosing(pipeline.ask(wish)) as outputs:
                    await anext(outputs)
            for _ in range(200):
                await asyncio.sleep(0.05)
                stats = pipeline.stats()
                if not stats.running and not stats.waiting and stats.decoded_tokens:
                    break
            assert stats.running == stats.waiting == 0
            assert stats.decoded_tokens < 100 * len(long)
            assert not pipeline._open
            assert all(server.load == 0 for server in pipeline._fleet.of("language"))

    asyncio.run(ask())
