"""Two servers answer as one process does, to the bit, and lose nothing that is on its way."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.small_talk import build, model_for, picture
from tests.serving.small_dvd import (
    QUICK,
    all_answers,
    all_of,
    answers_of,
    decoupled,
    joined,
    language_server,
    requests,
    said,
    working,
)

from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import Completion, EngineConfig, Request, TextIds, TokenOutput
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import RequestError, ServerError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.routing import KeepShare, Thresholds
from cascadevl.serving.coupled import Coupled
from cascadevl.serving.engine_thread import Answers
from cascadevl.serving.pipeline import Pipeline
from cascadevl.serving.vision_server import VisionConfig, VisionServer
from cascadevl.types import ImageRef, Message

PROCESSOR = build()
MODEL = model_for(PROCESSOR, increment="auto", trained_context=200)
INVARIANT = EngineConfig(num_pages=400, page_tokens=4, batch_invariant=True)
DRAWN = {"temperature": 1.3, "seed": 5, "logprobs": 2}


def by_engine(wishes: list[Request], model: Any = MODEL) -> list[tuple[Completion, ...]]:
    return Engine(model, PROCESSOR, INVARIANT).generate(wishes)


def facts(answers: list[tuple[Completion, ...]]) -> list[list[Any]]:
    """All of the answers that must be equal to the bit."""
    return [
        [(a.token_ids, a.text, a.finish_reason, a.logprobs, a.increments) for a in each]
        for each in answers
    ]


async def asked(answers: Answers, wishes: list[Request]) -> list[tuple[Completion, ...]]:
    await answers.start()
    try:
        return await all_answers(answers, wishes)
    finally:
        await answers.stop()


def test_one_process_gives_the_answers_of_the_engine_to_the_bit():
    wishes = requests(PROCESSOR, num_samples=2, sampling=DRAWN)
    coupled = Coupled(Engine(MODEL, PROCESSOR, INVARIANT))
    assert facts(asyncio.run(asked(coupled, wishes))) == facts(by_engine(wishes))


def test_a_budget_of_reasoning_is_kept_wherever_the_language_half_is():
    ids = PROCESSOR.tokenizer("one two<think>\n", add_special_tokens=False).input_ids
    start = PROCESSOR.tokenizer("<think>\n", add_special_tokens=False).input_ids
    prompt = (TextIds(tuple(ids[: -len(start)])), TextIds(tuple(start)))
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    wishes = [Request(prompt=prompt, sampling=sampling, thinking_budget=n) for n in (None, 3)]
    coupled = Coupled(Engine(MODEL, PROCESSOR, INVARIANT))
    (free,), (held,) = asyncio.run(asked(coupled, wishes))
    assert facts([(free,), (held,)]) == facts(by_engine(wishes))
    assert held.token_ids[:3] == free.token_ids[:3]
    assert "</think>" in held.text
    assert "</think>" not in free.text


BUDGETS = {
    "own thresholds": None,
    "full": "full",
    "compressed": "compressed",
    "half": KeepShare(0.5),
    "threshold": Thresholds(absolute=0.5),
    "quantile": Thresholds(absolute=0.0, relative=0.5),
}


def flash_model(**config: Any) -> CascadeVLForConditionalGeneration:
    """Auto increments, so that what the router leaves decides where tokens sit, too."""
    model = model_for(
        PROCESSOR,
        flash_mode=True,
        flash_heads=3,
        increment="auto",
        trained_context=140,
        **config,
    )
    with torch.no_grad():  # random weights differ too little in what they think of tiles
        for tensor in model.model.router.parameters():
            tensor.mul_(4)
    return model


def routes(answers: list[tuple[Completion, ...]]) -> list[tuple[int, ...]]:
    return [answer.tokens_per_tile for (answer,) in answers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_are_routed_where_they_are_encoded_and_answers_stay_to_the_bit(
    dtype: Any, tmp_path: Path
):
    model = flash_model(flash_absolute_threshold=0.5).to(dtype)
    wishes = [
        wish
        for budget in BUDGETS.values()
        for wish in requests(PROCESSOR, visual_budget=budget, sampling=DRAWN)
    ]
    expected = by_engine(wishes, model)
    assert any(len(set(each)) == 2 for each in routes(expected))  # mixed within a request
    coupled = Coupled(Engine(model, PROCESSOR, INVARIANT))

    async def ask() -> list[tuple[Completion, ...]]:
        async with decoupled(
            *(model, PROCESSOR, tmp_path),
            num_vision=2,
            num_language=2,
            engine=INVARIANT,
            address="tcp://127.0.0.1:0",
        ) as pipeline:
            return await all_answers(pipeline, wishes)

    for found in (asyncio.run(asked(coupled, wishes)), asyncio.run(ask())):
        assert facts(found) == facts(expected)
        assert routes(found) == routes(expected)
        usages = [answer.usage for (answer,) in found]
        assert [each.compressed_tiles for each in usages] == [
            answer.usage.compressed_tiles for (answer,) in expected
        ]
        assert [each.visual_tokens for each in usages] == [sum(each) for each in routes(expected)]


def test_only_the_visual_tokens_that_are_left_travel(tmp_path: Path):
    """Compressed tiles are a quarter of the bytes, and are encoded once for all budgets."""
    model = flash_model()
    sent: dict[str, int] = {}

    class Weighed(VisionServer):
        """Notes the bytes of features."""

        def _encoded(self, jobs: Any) -> Any:
            made = super()._encoded(jobs)
            sent[name] = sum(len(bits) for _, bits in made)
            return made

    async def ask() -> int:
        nonlocal name
        async with (
            decoupled(model, PROCESSOR, tmp_path, num_vision=0) as pipeline,
            working(Weighed(model, pipeline.addresses[0])),
        ):
            for name in ("full", "compressed"):
                (wish, *_) = requests(PROCESSOR, visual_budget=name)
                await answers_of(pipeline, wish)
            for _ in range(200):
                await asyncio.sleep(0.05)
                if pipeline.stats().cached_tiles:
                    break
            return pipeline.stats().encoded_tiles

    name = ""
    num_encoded = asyncio.run(ask())
    assert sent["full"] == 4 * sent["compressed"]
    assert num_encoded == len(requests(PROCESSOR)[0].prompt.tiles)


def test_a_plain_model_refuses_a_budget(tmp_path: Path):
    async def ask() -> None:
        async with decoupled(MODEL, PROCESSOR, tmp_path) as pipeline:
            with pytest.raises(RequestError, match="no router"):
                await all_of(pipeline, requests(PROCESSOR, visual_budget="compressed")[0])

    asyncio.run(ask())


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

    assert facts(asyncio.run(ask())) == facts(by_engine(wishes, model))


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

    assert facts(asyncio.run(ask())) == facts(by_engine(wishes))


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
            with pytest.raises(ServerError, match="no vision and no language server"):
                await all_of(pipeline, requests(PROCESSOR)[0])

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

    assert facts(asyncio.run(ask())) == facts(by_engine(wishes))


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


class Cable:
    """A way over TCP that can be cut; it can be used again at once."""

    def __init__(self, target: str) -> None:
        self._port = int(target.rpartition(":")[2])
        self._writers: list[asyncio.StreamWriter] = []
        self.num_cut = 0

    async def open(self) -> str:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        self.num_cut += len(self._writers) // 2
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def close(self) -> None:
        self._server.close()
        self.cut()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, back]
        await asyncio.gather(pump(reader, back), pump(there, writer))


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while content := await reader.read(4096):
            writer.write(content)
            await writer.drain()
    writer.close()


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

    assert facts(asyncio.run(ask())) == facts(by_engine(wishes))


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
