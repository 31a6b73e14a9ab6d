"""Servers that are missing, die or come back: no request is lost, and nothing is said twice."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.engine.small_talk import build, model_for
from tests.serving.small_dvd import (
    DRAWN,
    INVARIANT,
    QUICK,
    Cable,
    all_answers,
    all_of,
    answers_of,
    by_engine,
    decoupled,
    facts,
    joined,
    language_server,
    requests,
    said,
    working,
)

from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import Completion
from cascadevl.errors import UnavailableError
from cascadevl.serving.http_errors import refusal_of
from cascadevl.serving.pipeline import Pipeline
from cascadevl.serving.vision_server import VisionConfig, VisionServer

PROCESSOR = build()
MODEL = model_for(PROCESSOR, increment="auto", trained_context=200)

expected = partial(by_engine, MODEL, PROCESSOR)


def test_a_request_waits_for_a_server_to_come(tmp_path: Path):
    wish = requests(PROCESSOR)[0]

    async def ask() -> list[tuple[Completion, ...]]:
        async with decoupled(MODEL, PROCESSOR, tmp_path, num_vision=0) as pipeline:
            assert pipeline.unready == "no vision server is there"
            waiting = asyncio.create_task(answers_of(pipeline, wish))
            text_only = await answers_of(pipeline, requests(PROCESSOR)[1])
            assert len(text_only) == 1
            assert not waiting.done()
            async with working(VisionServer(MODEL, pipeline.addresses[0])):
                return [await waiting]

    assert len(asyncio.run(ask())) == 1


def test_a_request_does_not_wait_for_ever(tmp_path: Path):
    config = replace(QUICK, patience_s=0.5)

    async def ask() -> None:
        async with decoupled(
            MODEL, PROCESSOR, tmp_path, num_vision=0, num_language=0, config=config
        ) as pipeline:
            with pytest.raises(UnavailableError, match="no vision and no language server") as gone:
                await all_of(pipeline, requests(PROCESSOR)[0])
            refusal = refusal_of(gone.value)
            assert (refusal.status, refusal.headers) == (503, {"Retry-After": "5"})

    asyncio.run(ask())


def test_servers_of_other_weights_are_not_asked(tmp_path: Path):
    async def ask() -> str | None:
        async with decoupled(MODEL, PROCESSOR, tmp_path, num_vision=0) as pipeline:
            stranger = VisionServer(MODEL, pipeline.addresses[0], weights="others")
            async with working(stranger):
                await asyncio.sleep(1)
                return pipeline.unready

    assert asyncio.run(ask()) == "no vision server is there"


class Stuck(VisionServer):
    """Takes tiles and never encodes them."""

    async def work(self) -> None:
        """Wait for ever."""
        await asyncio.Event().wait()


def test_a_vision_server_that_dies_with_requests_loses_none(tmp_path: Path):
    wishes = requests(PROCESSOR)

    async def ask() -> list[tuple[Completion, ...]]:
        async with decoupled(
            MODEL, PROCESSOR, tmp_path, num_vision=0, engine=INVARIANT
        ) as pipeline:
            front = pipeline.addresses[0]
            async with working(Stuck(MODEL, front)):
                await joined(pipeline, 2)
                waiting = [asyncio.create_task(answers_of(pipeline, wish)) for wish in wishes]
                while not any(server.load for server in pipeline._fleet.of("vision")):
                    await asyncio.sleep(0.02)
            config = VisionConfig(batch_invariant=True)
            async with working(VisionServer(MODEL, front, config=config)):
                return await asyncio.gather(*waiting)

    assert facts(asyncio.run(ask())) == facts(expected(wishes))


def test_a_stream_goes_on_with_another_language_server(tmp_path: Path):
    """The first server is cut off in the middle; nothing is said twice, and nothing is left out."""
    wish = requests(PROCESSOR, stream=True, sampling={**DRAWN, "max_tokens": 60})[0]

    async def ask() -> tuple[list[Any], list[Any]]:
        async with decoupled(
            MODEL, PROCESSOR, tmp_path, num_language=2, engine=INVARIANT
        ) as pipeline:
            whole = await all_of(pipeline, wish)
            outputs = []
            async with aclosing(pipeline.ask(wish)) as stream:
                async for output in stream:
                    outputs.append(output)
                    if len(outputs) == 5:
                        (journey,) = pipeline._open.values()
                        assert journey.language is not None
                        await pipeline._lose(journey.language)
            return whole, outputs

    whole, outputs = asyncio.run(ask())
    assert [(o.token_id, o.text) for o in outputs[:-1]] == [
        (o.token_id, o.text) for o in whole[:-1]
    ]
    assert said([[outputs[-1]]]) == said([[whole[-1]]])


class Forgetful(VisionServer):
    """Loses the first features that it sends, as a connection does that is cut."""

    async def _transfer(self, way: Any) -> None:
        if self._num_ways > 1:
            return await super()._transfer(way)
        while not way.outgoing:
            await way.changed.wait()
            way.changed.clear()
        way.outgoing.popleft()
        way.link._sent[b""] += 1
        return None


def test_features_that_were_lost_on_the_way_are_sent_again(tmp_path: Path):
    wish = requests(PROCESSOR)[0]

    async def ask() -> tuple[Completion, ...]:
        async with (
            decoupled(MODEL, PROCESSOR, tmp_path, num_vision=0) as pipeline,
            working(Forgetful(MODEL, pipeline.addresses[0])),
        ):
            return await asyncio.wait_for(answers_of(pipeline, wish), 30)

    assert len(asyncio.run(ask())) == 1


@pytest.mark.parametrize("half", ["vision", "language"])
def test_a_cut_connection_loses_no_request(half: str, tmp_path: Path):
    wishes = requests(PROCESSOR, stream=True, sampling={**DRAWN, "max_tokens": 40}) * 3
    vision = VisionConfig(batch_invariant=True)

    async def ask() -> list[tuple[Completion, ...]]:
        pipeline = Pipeline(MODEL.config, ["tcp://127.0.0.1:0"], config=QUICK)
        await pipeline.start()
        front = pipeline.addresses[0]
        cable = Cable(front)
        through = await cable.open()
        at = {"vision": front, "language": front, half: through}
        engine = Engine(MODEL, PROCESSOR, INVARIANT)
        language = language_server(engine, at["language"], "tcp://127.0.0.1:0")
        async with (
            working(VisionServer(MODEL, at["vision"], config=vision)),
            working(language),
        ):
            try:
                await joined(pipeline, 2)
                asking = asyncio.create_task(all_answers(pipeline, wishes))
                for _ in range(3):
                    await asyncio.sleep(0.4)
                    cable.cut()
                found = await asyncio.wait_for(asking, 60)
                assert cable.num_cut
                return found
            finally:
                cable.close()
                await pipeline.stop()

    assert facts(asyncio.run(ask())) == facts(expected(wishes))


def test_a_front_that_starts_anew_finds_its_servers_again(tmp_path: Path):
    wish = requests(PROCESSOR)[0]
    address = f"ipc://{tmp_path}/front"

    async def ask() -> None:
        first = Pipeline(MODEL.config, [address], config=QUICK)
        await first.start()
        engine = Engine(MODEL, PROCESSOR, INVARIANT)
        language = language_server(engine, address, f"ipc://{tmp_path}/language")
        async with working(VisionServer(MODEL, address)), working(language):
            await joined(first, 2)
            assert len(await answers_of(first, wish)) == 1
            await first.stop()
            second = Pipeline(MODEL.config, [address], config=QUICK)
            await second.start()
            try:
                await joined(second, 2)
                assert len(await answers_of(second, wish)) == 1
            finally:
                await second.stop()

    asyncio.run(ask())
