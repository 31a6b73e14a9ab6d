"""The vLLM backend: what it sends, that embeddings say what ids and pictures say, every failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.engine.small_backend import checkpoint, requests_of
from tests.engine.test_transformers_backend import answers, check_stream, collected
from tests.engine.vllm_double import DONE, TextModel, event, vllm_double
from tests.eval.chat_server import Answered

from cascadevl.engine.backends import Backend, generate
from cascadevl.engine.http_json import HttpServer
from cascadevl.engine.requests import Request
from cascadevl.engine.transformers_backend import TransformersBackend
from cascadevl.engine.vllm import VllmBackend, connect
from cascadevl.errors import RequestError
from cascadevl.model.loading import load
from cascadevl.model.vision_half import load_vision_half


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("checkpoint") / "github")


@pytest.fixture(scope="module")
def half(folder: Path) -> Any:
    return load_vision_half(folder)


@pytest.fixture(scope="module")
def text_model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return TextModel(folder, tmp_path_factory.mktemp("text") / "half")


def backend_of(half: Any, url: str, **settings: Any) -> VllmBackend:
    server = HttpServer(url=url, timeout_s=20.0, max_retries=1, backoff_s=0.0)
    return connect(*half, server, **settings)


@pytest.fixture(scope="module")
def reference(folder: Path) -> TransformersBackend:
    model, processor = load(folder)
    return TransformersBackend(model=model, processor=processor)


def test_greedy_answers_are_those_of_the_whole_model(
    half: Any, text_model: TextModel, reference: TransformersBackend
) -> None:
    requests = requests_of(half[1])
    with vllm_double(text_model) as server:
        backend = backend_of(half, server.url)
        assert isinstance(backend, Backend)
        got = generate(backend, requests)
    expected = generate(reference, requests)
    for (mine,), (other,) in zip(got, expected, strict=True):
        assert mine.token_ids == other.token_ids
        assert mine.text == other.text
        assert mine.finish_reason == other.finish_reason
        assert mine.usage.visual_tokens == other.usage.visual_tokens
        assert mine.usage.cached_tokens == 16
        assert mine.increments == other.increments


def test_what_is_sent(half: Any, text_model: TextModel) -> None:
    request = requests_of(
        half[1],
        num_samples=3,
        temperature=0.7,
        top_p=0.9,
        top_k=11,
        min_p=0.05,
        repetition_penalty=1.1,
        seed=2**64 - 1,
        min_tokens=2,
        stop=("xyz",),
        stop_token_ids=(9,),
        ignore_eos=False,
    )[0]
    with vllm_double(text_model) as server:
        generate(backend_of(half, server.url), [request])
    (body,) = server.bodies  # three samples, one prompt
    embeds = body.pop("prompt_embeds")
    assert isinstance(embeds, str)
    ends = half[1].stop_token_ids(half[0].generation_config.eos_token_id)
    assert set(body.pop("stop_token_ids")) == {9, *ends}
    assert body == {
        "model": "text",
        "n": 3,
        "max_tokens": 8,
        "min_tokens": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 11,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "seed": 2**62 - 1,
        "stop": ["xyz"],
        "ignore_eos": False,
        "return_token_ids": True,
    }
    assert server.headers[0]["path"] == "/v1/completions"


def test_the_embeddings_take_no_more_room_than_they_need(half: Any, text_model: TextModel) -> None:
    request = requests_of(half[1])[1]
    with vllm_double(text_model) as server:
        ((answer,),) = generate(backend_of(half, server.url), [request])
    num_bytes = len(server.bodies[0]["prompt_embeds"]) * 3 // 4
    assert num_bytes < answer.usage.prompt_tokens * 32 * 4 + 2000


def test_a_schema_goes_along(half: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    choice = {"index": 0, "token_ids": [5], "finish_reason": "length"}
    with vllm_double(lambda _: Answered({"choices": [choice]})) as server:
        request = requests_of(half[1], json_schema=json.dumps(schema), ignore_eos=False)[1]
        generate(backend_of(half, server.url), [request])
    assert server.bodies[0]["structured_outputs"] == {"json": schema}


def test_samples_are_all_there_and_greedy_ones_are_asked_once(
    half: Any, text_model: TextModel
) -> None:
    with vllm_double(text_model) as server:
        backend = backend_of(half, server.url)
        (greedy,) = generate(backend, requests_of(half[1], num_samples=3)[:1])
        (drawn,) = generate(backend, requests_of(half[1], num_samples=4, temperature=1.0)[:1])
    assert [body["n"] for body in server.bodies] == [1, 4]
    assert [each.sample for each in greedy] == [0, 1, 2]
    assert len({each.token_ids for each in greedy}) == 1
    assert [each.sample for each in drawn] == [0, 1, 2, 3]
    assert len({each.token_ids for each in drawn}) > 1


def test_logprobs_are_read(
    half: Any, text_model: TextModel, reference: TransformersBackend
) -> None:
    requests = requests_of(half[1], logprobs=2)[:2]
    with vllm_double(text_model) as server:
        got = generate(backend_of(half, server.url), requests)
    for (mine,), (other,) in zip(got, generate(reference, requests), strict=True):
        assert mine.logprobs is not None
        assert other.logprobs is not None
        for one, two in zip(mine.logprobs, other.logprobs, strict=True):
            assert one.chosen == pytest.approx(two.chosen, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in two.top]


def test_what_stands_behind_a_stop_is_left_out(
    half: Any, text_model: TextModel, reference: TransformersBackend
) -> None:
    (whole,) = generate(reference, requests_of(half[1])[:1])[0]
    ended = whole.token_ids[4]
    requests = requests_of(half[1], stop_token_ids=(ended,))[:1]
    with vllm_double(text_model) as server:
        (answer,) = generate(backend_of(half, server.url), requests)[0]
    place = whole.token_ids.index(ended)
    assert answer.token_ids == whole.token_ids[:place]
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("stop", place + 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stop_early", [False, True])
def test_a_stream_is_the_answer_piece_by_piece(
    half: Any, text_model: TextModel, temperature: float, stop_early: bool
) -> None:
    with vllm_double(text_model) as server:
        backend = backend_of(half, server.url)
        request = requests_of(half[1], num_samples=2, temperature=temperature, logprobs=1)[0]
        if stop_early:
            ended = generate(backend, [request])[0][0].token_ids[2]
            more = {"temperature": temperature, "logprobs": 1, "stop_token_ids": (ended,)}
            request = requests_of(half[1], num_samples=2, **more)[0]
        outputs = collected(backend, request)
        answers = generate(backend, [request])[0]
    check_stream(outputs, answers)
    for answer in answers:
        mine = [each.logprobs for each in outputs if each.sample == answer.sample]
        assert tuple(mine[: len(answer.token_ids)]) == answer.logprobs


def test_increments_other_than_1_are_refused_and_the_others_answered(
    half: Any, text_model: TextModel
) -> None:
    first, second, third = requests_of(half[1])
    smaller = Request(prompt=third.prompt, sampling=third.sampling, increments=(1.0, 0.25))
    with vllm_double(text_model) as server:
        backend = backend_of(half, server.url)
        assert not backend.capabilities.increments
        outcomes = dict(backend.answer([first, smaller, second]))
    assert len(server.bodies) == 2
    assert isinstance(outcomes[1], RequestError)
    assert "step by 0.25 positions" in str(outcomes[1])
    assert not isinstance(outcomes[0], RequestError)
    assert not isinstance(outcomes[2], RequestError)


def test_new_weights_are_refused_with_the_way_out(half: Any, text_model: TextModel) -> None:
    with vllm_double(text_model) as server:
        backend = backend_of(half, server.url)
    assert not backend.capabilities.weight_refresh
    with pytest.raises(RequestError, match="convert --language-only"):
        backend.load(half[0].state_dict())


def test_a_prompt_that_is_too_long_there_is_its_own_failure(
    half: Any, text_model: TextModel
) -> None:
    requests = requests_of(half[1])
    long = requests_of(half[1], max_tokens=390)[0]
    with vllm_double(text_model) as server:
        outcomes = dict(backend_of(half, server.url).answer([requests[0], long, requests[1]]))
    assert isinstance(outcomes[1], RequestError)
    assert "maximum context length is 400" in str(outcomes[1])
    assert not isinstance(outcomes[2], RequestError)


def test_what_the_server_would_cut_short_is_not_sent(half: Any, text_model: TextModel) -> None:
    """vLLM answers such a request, with fewer tokens than were asked for."""
    good = requests_of(half[1])[1]
    long = requests_of(half[1], max_tokens=390)[1]
    with vllm_double(text_model, max_model_len=400) as server:
        backend = backend_of(half, server.url)
        assert backend.max_tokens == 400
        outcomes = dict(backend.answer([good, long]))
        fits = 400 - outcomes[0][0].usage.prompt_tokens  # type: ignore[union-attr]
        exactly = requests_of(half[1], max_tokens=fits)[1]
        assert len(generate(backend, [exactly])[0][0].token_ids) == fits
    assert len(server.bodies) == 2
    assert isinstance(outcomes[1], RequestError)
    assert f"needs {400 - fits + 390} tokens" in str(outcomes[1])
    assert "takes 400" in str(outcomes[1])


@pytest.mark.parametrize(
    ("answered", "problem"),
    [
        (
            Answered(b"You must set `--enable-prompt-embeds`", status=400),
            "start the server with --enable-prompt-embeds",
        ),
        (Answered(b"hidden_size 32 does not match 64", status=400), "this very checkpoint"),
        (Answered(b"no such model", status=404), "knows"),
        (Answered(b"out of memory", status=500), "2 times in a row"),
        (Answered(b"<html>"), "as vLLM's completions do"),
        (Answered({"choices": []}), "0 choices for 1 samples"),
        (Answered({"choices": [{"index": 0, "text": "no ids"}]}), "as vLLM's completions do"),
        (Answered({"error": {"message": "engine died"}}), "engine died"),
        (
            Answered({"choices": [{"index": 0, "token_ids": [1], "finish_reason": "abort"}]}),
            "ended with 'abort'",
        ),
    ],
)
def test_what_cannot_work_stops_everything(half: Any, answered: Answered, problem: str) -> None:
    with vllm_double(lambda _: answered) as server:
        server_ = HttpServer(
            url=server.url,
            timeout_s=20.0,
            max_retries=1,
            backoff_s=0.0,
            remedies={404: "check that the server knows it"},
        )
        backend = connect(*half, server_)
        with pytest.raises(RequestError, match=problem):
            list(backend.answer(requests_of(half[1]) * 20))
        assert len(server.bodies) < 60


def stream_of(*events: object, end: bytes = DONE) -> Answered:
    return Answered(b"".join(map(event, events)) + end)


PIECE = {"choices": [{"index": 0, "token_ids": [5], "finish_reason": None}]}


@pytest.mark.parametrize(
    ("answered", "problem"),
    [
        (Answered(b"too long", status=400), "refuses it: status 400"),
        (Answered(b"out of memory", status=500), "status 500"),
        (stream_of(PIECE), "ended before the answers did"),
        (stream_of(PIECE, end=b""), "ended before the answers did"),
        (stream_of(PIECE, {"error": {"message": "engine died"}}), "engine died"),
        (stream_of({"nothing": 1}), "as vLLM's completions do"),
    ],
)
def test_a_stream_that_breaks_says_so(half: Any, answered: Answered, problem: str) -> None:
    with (
        vllm_double(lambda _: answered) as server,
        pytest.raises(RequestError, match=problem),
    ):
        collected(backend_of(half, server.url), requests_of(half[1])[0])


def test_the_end_that_the_server_names_counts_where_the_tokens_show_none(half: Any) -> None:
    end = {"choices": [{"index": 0, "token_ids": [], "finish_reason": "stop"}]}
    with vllm_double(lambda _: stream_of(PIECE, end)) as server:
        outputs = collected(backend_of(half, server.url), requests_of(half[1])[0])
    assert [output.token_id for output in outputs] == [5, None]
    assert [output.finish_reason for output in outputs] == [None, "stop"]


@pytest.mark.parametrize(
    ("models", "wanted", "problem"),
    [
        (("a", "b"), None, "lists a, b, name one of them"),
        (("a", "b"), "c", "lists a, b, but not 'c'"),
        ((), None, "lists no models"),
    ],
)
def test_the_model_must_be_served(
    half: Any, models: tuple[str, ...], wanted: str | None, problem: str
) -> None:
    with (
        vllm_double(lambda _: Answered(), models) as server,
        pytest.raises(RequestError, match=problem),
    ):
        backend_of(half, server.url, served_model=wanted)


def test_one_of_several_models_is_taken_by_name(half: Any, text_model: TextModel) -> None:
    with vllm_double(text_model, ("a", "b")) as server:
        generate(backend_of(half, server.url, served_model="b"), requests_of(half[1])[:1])
    assert server.bodies[0]["model"] == "b"


def test_no_more_than_so_many_are_asked_at_a_time_and_prompts_are_made_as_there_is_room(
    half: Any, text_model: TextModel
) -> None:
    taken, done = 0, 0
    most = 0

    def asked() -> Any:
        nonlocal taken, most
        for request in requests_of(half[1], max_tokens=2) * 4:
            taken += 1
            most = max(most, taken - done)
            yield request

    with vllm_double(text_model) as server:
        for _ in backend_of(half, server.url, concurrency=3).answer(asked()):
            done += 1
    assert done == 12
    assert server.most_at_once <= 3
    assert most <= 4


def test_all_bodies_answer_through_embeddings(tmp_path: Path) -> None:
    """GPT-OSS is not among them: transformers' own masks for its windows are another thing."""
    for family in ("qwen2", "internlm2"):
        source = checkpoint(tmp_path / family, family)
        text = TextModel(source, tmp_path / f"{family}-text")
        model, processor = load(source)
        requests = requests_of(processor)[::2]
        expected = answers(TransformersBackend(model=model, processor=processor), requests)
        with vllm_double(text) as server:
            assert answers(backend_of(load_vision_half(source), server.url), requests) == expected
