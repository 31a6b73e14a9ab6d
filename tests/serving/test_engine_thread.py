"""The engine in its own thread: answers of many who ask at once, calls off, failures."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.engine.small_prompts import engine_for, prompts, requests
from tests.model.small import small_model

from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import Completion, Request, TokenOutput
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import RequestError, ServerError
from cascadevl.serving.engine_thread import EngineThread, Output

LONG = SamplingParams(max_tokens=200, ignore_eos=True)


@contextmanager
def thread_of(engine: Engine) -> Iterator[EngineThread]:
    thread = EngineThread(engine)
    try:
        yield thread
    finally:
        thread.close()


async def all_of(thread: EngineThread, request: Request) -> list[Output]:
    return [output async for output in thread.ask(request)]


async def answers_of(thread: EngineThread, request: Request) -> tuple[tuple[int, ...], ...]:
    outputs = await all_of(thread, request)
    found = [output for output in outputs if isinstance(output, Completion)]
    return tuple(each.token_ids for each in sorted(found, key=lambda each: each.sample))


def test_many_at_once_get_what_the_engine_says():
    wishes = requests(SamplingParams(max_tokens=9, ignore_eos=True, temperature=1.0), num_samples=3)
    expected = engine_for(small_model()).generate(wishes)
    engine = engine_for(small_model())

    async def ask() -> list[Any]:
        return await asyncio.gather(*(answers_of(thread, each) for each in wishes))

    with thread_of(engine) as thread:
        found = asyncio.run(ask())
    assert found == [tuple(each.token_ids for each in answers) for answers in expected]
    engine.check()


def test_tokens_come_before_the_answer_they_make():
    with thread_of(engine_for(small_model())) as thread:
        request = replace(requests()[0], stream=True)
        outputs = asyncio.run(all_of(thread, request))
    *tokens, last = outputs
    assert isinstance(last, Completion)
    ids = [token.token_id for token in tokens if isinstance(token, TokenOutput)]
    assert tuple(ids) == last.token_ids
    assert len(ids) == 8


def test_whoever_leaves_calls_the_request_off():
    engine = engine_for(small_model())

    async def leave() -> None:
        async with aclosing(thread.ask(replace(requests(LONG)[0], stream=True))) as outputs:
            async for _ in outputs:
                break
        while not engine.is_idle:
            await asyncio.sleep(0.01)

    with thread_of(engine) as thread:
        asyncio.run(asyncio.wait_for(leave(), 20))
        assert engine.stats().decoded_tokens < 200
    engine.check()


def test_whoever_leaves_before_the_engine_has_the_request_calls_it_off_too():
    engine = engine_for(small_model())

    async def leave() -> None:
        for _ in range(20):
            task = asyncio.create_task(all_of(thread, requests(LONG)[0]))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await answers_of(thread, requests()[1])
        while not engine.is_idle:
            await asyncio.sleep(0.01)

    with thread_of(engine) as thread:
        asyncio.run(asyncio.wait_for(leave(), 20))
    engine.check()
    assert not thread._waiters
    assert not thread._early


def test_what_can_never_be_answered_is_refused():
    with thread_of(engine_for(small_model())) as thread:
        sampling = SamplingParams(max_tokens=10**6)
        with pytest.raises(RequestError, match="pages"):
            asyncio.run(all_of(thread, Request(prompt=prompts()[1], sampling=sampling)))


def test_a_step_that_fails_ends_what_is_open_and_the_next_request_is_answered():
    model = small_model()
    engine = engine_for(model)
    hook = model.lm_head.register_forward_hook(fails)
    with thread_of(engine) as thread:
        with pytest.raises(ServerError, match="no memory"):
            asyncio.run(all_of(thread, requests()[0]))
        hook.remove()
        assert thread.failure is None
        assert len(asyncio.run(answers_of(thread, requests()[1]))) == 1
    engine.check()


def fails(*_: object) -> None:
    raise RuntimeError("no memory")


def test_logits_that_are_not_finite_are_an_error_of_the_server():
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with thread_of(engine_for(model)) as thread, pytest.raises(ServerError, match="not finite"):
        asyncio.run(all_of(thread, requests()[0]))


def test_a_stopped_engine_says_so():
    thread = EngineThread(engine_for(small_model()))
    thread.close()
    assert thread.failure == "the engine was stopped"


def test_closing_ends_what_is_open():
    thread = EngineThread(engine_for(small_model()))

    async def ask() -> None:
        async with aclosing(thread.ask(replace(requests(LONG)[0], stream=True))) as outputs:
            await anext(outputs)
            await asyncio.to_thread(thread.close)
            async for _ in outputs:
                pass

    with pytest.raises(ServerError, match="shutting down"):
        asyncio.run(ask())
