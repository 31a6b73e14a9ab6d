"""A language server that asks vLLM: the answers of the whole model, and what failures become."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.engine.small_talk import build, model_for
from tests.engine.vllm_double import TextModel, refused, vllm_double
from tests.eval.chat_server import Answered, Body
from tests.serving.small_dvd import QUICK, all_answers, all_of, joined, requests, working

from cascadevl.engine.engine import Engine
from cascadevl.engine.http_json import HttpServer
from cascadevl.engine.requests import Completion, EngineConfig, Request, TokenOutput
from cascadevl.engine.vllm import connect
from cascadevl.errors import RequestError, ServerError, UnavailableError
from cascadevl.model.language_half import load_language_half
from cascadevl.model.loading import save
from cascadevl.model.routing import KeepShare
from cascadevl.serving.language_server import LanguageServer
from cascadevl.serving.pipeline import Pipeline
from cascadevl.serving.vision_server import VisionServer
from cascadevl.serving.vllm_answers import VllmAnswers

PROCESSOR = build()
MODEL = model_for(PROCESSOR, flash_mode=True, flash_heads=3)
FULL: dict[str, Any] = {"visual_budget": "full"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "whole"
    save(MODEL, PROCESSOR, folder)
    return folder


@pytest.fixture(scope="module")
def text_model(folder: Path) -> TextModel:
    return TextModel(folder, folder.with_name("text"))


def asking(folder: Path, url: str) -> VllmAnswers:
    """The answers of a server, by a process that holds the token embedding alone."""
    http = HttpServer(url=url, timeout_s=20.0, max_retries=0)
    return VllmAnswers(connect(*load_language_half(folder, layers=False), http))


@asynccontextmanager
async def fronting(tmp_path: Path, *answers: VllmAnswers) -> AsyncIterator[Pipeline]:
    """A front with a vision server, and a language server for each that computes answers."""
    pipeline = Pipeline(MODEL.config, [f"ipc://{tmp_path}/front"], config=QUICK)
    await pipeline.start()
    (front,) = pipeline.addresses
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(working(VisionServer(MODEL, front)))
        for number, each in enumerate(answers):
            at, mark = f"ipc://{tmp_path}/language{number}", PROCESSOR.image_token_id
            server = LanguageServer(each, front, at, image_token_id=mark)
            each.on_lost = server.stop
            await stack.enter_async_context(working(server))
            await joined(pipeline, 2 + number)  # in this order
        try:
            yield pipeline
        finally:
            await pipeline.stop()


def by_engine(wishes: list[Request]) -> list[tuple[Completion, ...]]:
    return Engine(MODEL, PROCESSOR, EngineConfig(num_pages=400, page_tokens=4)).generate(wishes)


def facts(answers: list[tuple[Completion, ...]]) -> list[Any]:
    return [
        [(a.token_ids, a.text, a.finish_reason, a.usage.visual_tokens) for a in each]
        for each in answers
    ]


def test_the_embedding_alone_is_read(folder: Path):
    model, _ = load_language_half(folder, layers=False)
    read = {name for name, tensor in model.named_parameters() if not tensor.is_meta}
    assert read == {"model.language_model.embed_tokens.weight"}
    assert model.device.type == "cpu"


@pytest.mark.parametrize("budget", ["full", KeepShare(0.5)], ids=["full", "routed"])
def test_greedy_answers_are_those_of_the_whole_model(
    budget: Any, folder: Path, text_model: TextModel, tmp_path: Path
):
    wishes = requests(PROCESSOR, visual_budget=budget, num_samples=2)

    async def ask(url: str) -> list[tuple[Completion, ...]]:
        answers = asking(folder, url)
        async with fronting(tmp_path, answers) as pipeline:
            found = await all_answers(pipeline, wishes)
            while answers.stats().running:
                await asyncio.sleep(0.01)
            return found

    with vllm_double(text_model) as server:
        found = asyncio.run(ask(server.url))
    assert facts(found) == facts(by_engine(wishes))
    assert len(server.bodies) == len(wishes)
    if budget != "full":
        assert any(answer.usage.visual_tokens % 4 for each in found for answer in each)


def test_a_stream_brings_the_tokens_then_the_answer(
    folder: Path, text_model: TextModel, tmp_path: Path
):
    (wish, *_) = requests(PROCESSOR, stream=True, sampling={"logprobs": 2}, **FULL)

    async def ask(url: str) -> tuple[list[Any], int]:
        answers = asking(folder, url)
        async with fronting(tmp_path, answers) as pipeline:
            return await all_of(pipeline, wish), answers.stats().decoded_tokens

    with vllm_double(text_model) as server:
        (*tokens, whole), decoded = asyncio.run(ask(server.url))
    assert all(isinstance(each, TokenOutput) for each in tokens)
    assert isinstance(whole, Completion)
    assert tuple(each.token_id for each in tokens) == whole.token_ids
    assert "".join(each.text for each in tokens) == whole.text
    assert tuple(each.logprobs for each in tokens) == whole.logprobs
    assert decoded == len(tokens) == 10


@pytest.mark.parametrize(
    ("answer", "kind", "problem"),
    [
        (lambda _: refused("maximum context length is 400 tokens"), RequestError, "refuses it"),
        (lambda _: refused("hidden_size 7 does not match"), ServerError, "of this very checkpoint"),
        (lambda _: Answered({"no": "choices"}), ServerError, "stream ended before"),
        (lambda _: Answered(status=500), ServerError, "status 500"),
        (lambda _: Answered(status=503), UnavailableError, "status 503"),
        (lambda _: Answered(status=429), UnavailableError, "status 429"),
    ],
    ids=["one request", "every request", "nonsense", "broken", "not there", "too busy"],
)
def test_a_failure_is_the_requests_or_the_servers(
    answer: Callable[[Body], Answered], kind: Any, problem: str, folder: Path, tmp_path: Path
):
    async def ask(url: str) -> None:
        async with fronting(tmp_path, asking(folder, url)) as pipeline:
            for wish in requests(PROCESSOR, **FULL)[:2]:
                with pytest.raises(kind, match=problem) as caught:
                    await all_of(pipeline, wish)
                assert caught.type is kind

    with vllm_double(answer) as server:
        asyncio.run(ask(server.url))


def test_increments_that_vllm_cannot_count_are_refused(
    folder: Path, text_model: TextModel, tmp_path: Path
):
    async def ask(url: str) -> None:
        async with fronting(tmp_path, asking(folder, url)) as pipeline:
            with pytest.raises(RequestError, match="numbers embeddings"):
                await all_of(pipeline, requests(PROCESSOR, increments=0.25, **FULL)[0])

    with vllm_double(text_model) as server:
        asyncio.run(ask(server.url))


def test_requests_of_a_server_that_is_gone_go_to_another(
    folder: Path, text_model: TextModel, tmp_path: Path
):
    wishes = requests(PROCESSOR, **FULL)

    async def ask(url: str, gone: VllmAnswers) -> list[tuple[Completion, ...]]:
        async with fronting(tmp_path, gone, asking(folder, url)) as pipeline:
            found = await asyncio.wait_for(all_answers(pipeline, wishes), 60)
            assert len(pipeline._fleet.of("language")) == 1
            return found

    with vllm_double(text_model) as server:
        gone = asking(folder, server.url)
    with vllm_double(text_model) as server:
        found = asyncio.run(ask(server.url, gone))
    assert facts(found) == facts(by_engine(wishes))


def test_a_request_that_is_called_off_is_held_no_more(folder: Path, tmp_path: Path):
    import threading

    hold = threading.Event()

    async def ask(url: str) -> None:
        answers = asking(folder, url)
        async with fronting(tmp_path, answers) as pipeline:
            asked = asyncio.create_task(all_of(pipeline, requests(PROCESSOR, **FULL)[0]))
            while not server.bodies:
                await asyncio.sleep(0.01)
            assert answers.stats().running == 1
            asked.cancel()
            while answers.stats().running:
                await asyncio.sleep(0.01)
            hold.set()

    with vllm_double(lambda _: Answered(status=500, hold=hold)) as server:
        asyncio.run(asyncio.wait_for(ask(server.url), 30))


def test_no_more_is_asked_at_a_time_than_there_are_threads(
    folder: Path, text_model: TextModel, tmp_path: Path
):
    async def ask(url: str) -> None:
        http = HttpServer(url=url, timeout_s=20.0, max_retries=0)
        backend = connect(*load_language_half(folder, layers=False), http)
        answers = VllmAnswers(backend, concurrency=2)
        wish = next(each for each in requests(PROCESSOR, **FULL) if not len(each.prompt.tiles))

        async def one() -> None:
            async with aclosing(answers.ask(wish)) as outputs:
                assert len([output async for output in outputs]) == 1

        await asyncio.gather(*(one() for _ in range(6)))
        answers.close()

    with vllm_double(text_model) as server:
        asyncio.run(ask(server.url))
    assert len(server.bodies) == 6
    assert server.most_at_once <= 2
