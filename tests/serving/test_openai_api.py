"""The API as OpenAI's own client sees it, over a real socket."""

from __future__ import annotations

import json
import threading
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import av
import numpy as np
import openai
import pytest
import torch
from tests.engine.small_talk import picture
from tests.serving.small_server import NAME, Served, serving, shown, small_pair, until

from cascadevl.data.chat import to_messages
from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import Completion, EngineConfig, Request, TextIds
from cascadevl.engine.sampling import SamplingParams

MODEL, PROCESSOR = small_pair()
ONE, TWO = picture(0), picture(1, (20, 70))
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": [shown(ONE), {"type": "text", "text": "what is this?"}]}],
    [{"role": "user", "content": "one two"}],
    [
        {"role": "system", "content": "quick"},
        {"role": "user", "content": [shown(ONE), shown(TWO), {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ],
]
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 12}
GREEDY["extra_body"] = {"ignore_eos": True}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(MODEL, PROCESSOR) as server:
        yield server


def expected(
    conversation: list[dict[str, Any]], num_samples: int = 1, **wishes: Any
) -> tuple[Completion, ...]:
    """What the engine says in the test's own thread."""
    prompt = PROCESSOR.prompt(to_messages(conversation))
    sampling = SamplingParams(**{"max_tokens": 12, "ignore_eos": True} | wishes)
    engine = Engine(MODEL, PROCESSOR, EngineConfig(num_pages=300, page_tokens=4))
    request = Request(prompt=prompt, sampling=sampling, num_samples=num_samples)
    return engine.generate([request])[0]


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=["picture", "text", "turns"])
def test_answers_are_those_of_the_engine(served: Served, conversation: Any):
    reply = served.client.chat.completions.create(messages=conversation, **GREEDY)
    (answer,) = expected(conversation)
    (choice,) = reply.choices
    assert choice.message.content == answer.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert reply.model == NAME
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == answer.usage.prompt_tokens
    assert reply.usage.completion_tokens == 12
    assert reply.usage.total_tokens == answer.usage.prompt_tokens + 12
    details = reply.usage.prompt_tokens_details.model_dump()
    assert details["visual_tokens"] == answer.usage.visual_tokens


def text_of(events: Any) -> str:
    return "".join(event.choices[0].delta.content or "" for event in events if event.choices)


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=["picture", "text", "turns"])
def test_a_stream_says_the_same(served: Served, conversation: Any):
    events = list(
        served.client.chat.completions.create(
            messages=conversation, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    (answer,) = expected(conversation)
    assert text_of(events) == answer.text
    assert len({event.id for event in events}) == 1
    assert events[0].choices[0].delta.role == "assistant"
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"
    assert not events[-1].choices
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 12


def test_a_question_asked_again_is_found_in_the_cache(served: Served):
    for _ in range(2):
        reply = served.client.chat.completions.create(messages=CONVERSATIONS[2], **GREEDY)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details is not None
    assert (reply.usage.prompt_tokens_details.cached_tokens or 0) > 0


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_with_a_seed(served: Served, stream: bool):
    wishes = GREEDY | {"temperature": 1.5, "n": 3, "seed": 7, "stream": stream}
    reply = served.client.chat.completions.create(messages=CONVERSATIONS[0], **wishes)
    texts = ["", "", ""]
    if stream:
        for event in reply:
            for choice in event.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        for choice in reply.choices:
            texts[choice.index] = choice.message.content
    answers = expected(CONVERSATIONS[0], 3, temperature=1.5, seed=7)
    assert texts == [answer.text for answer in answers]
    assert len(set(texts)) > 1


def test_without_a_seed_answers_differ(served: Served):
    wishes = GREEDY | {"temperature": 2}
    texts = {
        served.client.chat.completions.create(messages=CONVERSATIONS[1], **wishes)
        .choices[0]
        .message.content
        for _ in range(3)
    }
    assert len(texts) > 1


def test_log_probabilities(served: Served):
    wishes = GREEDY | {"logprobs": True, "top_logprobs": 2}
    reply = served.client.chat.completions.create(messages=CONVERSATIONS[1], **wishes)
    (answer,) = expected(CONVERSATIONS[1], logprobs=2)
    shown_ = reply.choices[0].logprobs
    assert shown_ is not None
    assert shown_.content is not None
    assert answer.logprobs is not None
    for token, known in zip(shown_.content, answer.logprobs, strict=True):
        assert token.logprob == pytest.approx(known.chosen, abs=1e-6)
        assert [each.logprob for each in token.top_logprobs] == pytest.approx(
            [value for _, value in known.top], abs=1e-6
        )
    content = b"".join(bytes(token.bytes or ()) for token in shown_.content)
    assert content.decode("utf-8", "replace") == answer.text
    events = served.client.chat.completions.create(messages=CONVERSATIONS[1], stream=True, **wishes)
    streamed = [
        token
        for event in events
        if event.choices[0].logprobs is not None
        for token in event.choices[0].logprobs.content or ()
    ]
    assert streamed == shown_.content


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer(served: Served, stream: bool):
    (whole,) = expected(CONVERSATIONS[1])
    stop = whole.text[3:5]
    (answer,) = expected(CONVERSATIONS[1], stop=(stop,))
    wishes = GREEDY | {"stop": stop, "stream": stream}
    reply = served.client.chat.completions.create(messages=CONVERSATIONS[1], **wishes)
    if stream:
        events = list(reply)
        text, reason = text_of(events), events[-1].choices[0].finish_reason
    else:
        text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert (text, reason) == (answer.text, "stop")


SCHEMA = {
    "type": "object",
    "properties": {"word": {"enum": ["one", "two"]}, "sure": {"type": "boolean"}},
    "required": ["word", "sure"],
    "additionalProperties": False,
}


def test_an_answer_that_follows_a_schema(served: Served):
    format_ = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    reply = served.client.chat.completions.create(
        model=NAME, messages=CONVERSATIONS[0], max_tokens=60, response_format=format_
    )
    found = json.loads(reply.choices[0].message.content or "")
    assert set(found) == {"word", "sure"}
    assert found["word"] in ("one", "two")


TOOLS = [
    {
        "type": "function",
        "function": {"name": "find", "description": "Find it", "parameters": SCHEMA},
    },
    {"type": "function", "function": {"name": "stop"}},
]


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called(served: Served, stream: bool):
    choice = {"type": "function", "function": {"name": "find"}}
    reply = served.client.chat.completions.create(
        model=NAME,
        messages=CONVERSATIONS[0],
        max_tokens=80,
        tools=TOOLS,
        tool_choice=choice,
        stream=stream,
    )
    if stream:
        events = list(reply)
        deltas = [d for event in events for d in event.choices[0].delta.tool_calls or ()]
        name, reason = deltas[0].function.name, events[-1].choices[0].finish_reason
        arguments = "".join(delta.function.arguments or "" for delta in deltas)
        assert deltas[0].id
        assert len(deltas) > 2
    else:
        (call,) = reply.choices[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
        reason = reply.choices[0].finish_reason
        assert reply.choices[0].message.content is None
    assert name == "find"
    assert json.loads(arguments)["word"] in ("one", "two")
    assert reason == "tool_calls"


UNDRAWN: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 200}


def say(model: Any, processor: Any, text: str) -> None:
    """Make a model say a text, again and again, one token a call of its head."""
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    script = cycle([*ids, processor.stop_token_ids()[0]])

    def scripted(_: object, __: object, logits: torch.Tensor) -> torch.Tensor:
        chosen = torch.zeros_like(logits)
        chosen[:, next(script)] = 1
        return chosen

    model.lm_head.register_forward_hook(scripted)


def test_what_a_model_calls_and_why_stand_apart_from_what_it_says():
    model, processor = small_pair()
    call = '<tool_call>\n{"name": "find", "arguments": {"word": "one", "sure": true}}\n</tool_call>'
    say(model, processor, f"<think>\nI look.\n</think>\n\nWait.\n{call}")
    wishes: Any = UNDRAWN | {"tools": TOOLS}
    with serving(model, processor) as served:
        create = served.client.chat.completions.create
        reply = create(messages=CONVERSATIONS[1], **wishes)
        message = reply.choices[0].message
        assert message.model_dump()["reasoning_content"] == "I look."
        assert message.content == "Wait."
        assert message.tool_calls is not None
        assert json.loads(message.tool_calls[0].function.arguments)["word"] == "one"
        assert reply.choices[0].finish_reason == "tool_calls"
        events = list(create(messages=CONVERSATIONS[1], stream=True, **wishes))
        deltas = [event.choices[0].delta for event in events]
        assert text_of(events) == "Wait."
        reasons = [delta.model_dump().get("reasoning_content") or "" for delta in deltas]
        assert "".join(reasons) == "I look."
        calls = [each for delta in deltas for each in delta.tool_calls or ()]
        assert calls[0].function.name == "find"
        arguments = "".join(each.function.arguments or "" for each in calls)
        assert arguments == message.tool_calls[0].function.arguments
        assert events[-1].choices[0].finish_reason == "tool_calls"
        plain = create(messages=CONVERSATIONS[1], **wishes | {"tool_choice": "none"})
        assert plain.choices[0].message.content == f"Wait.\n{call}"
        assert plain.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(("parallel", "number"), [(None, 2), (True, 2), (False, 1)])
def test_one_call_where_no_more_are_wanted(parallel: bool | None, number: int):
    model, processor = small_pair()
    call = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    say(model, processor, f"{call}\n{call}")
    wishes: Any = {} if parallel is None else {"parallel_tool_calls": parallel}
    with serving(model, processor) as served:
        reply = served.client.chat.completions.create(
            messages=CONVERSATIONS[1], tools=TOOLS, **UNDRAWN, **wishes
        )
    assert [each.function.arguments for each in reply.choices[0].message.tool_calls or ()] == [
        "{}"
    ] * number
    assert reply.choices[0].finish_reason == "tool_calls"


def test_a_conversation_with_tools_and_their_results(served: Served):
    call = {"id": "c", "type": "function", "function": {"name": "stop", "arguments": "{}"}}
    turns: Any = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "two"},
    ]
    reply = served.client.chat.completions.create(messages=turns, tools=TOOLS, **GREEDY)
    assert reply.usage is not None
    calls = [{"function": {"name": "stop", "arguments": "{}"}}]
    turns[1] = {"role": "assistant", "content": "", "tool_calls": calls}
    example = PROCESSOR.prompt(turns, tools=TOOLS)
    assert reply.usage.prompt_tokens == len(example.input_ids)


def test_thinking_is_certain_where_it_is_asked_for(served: Served):
    for thinking in (True, False):
        wishes = GREEDY | {"extra_body": {"thinking": thinking, "ignore_eos": True}}
        reply = served.client.chat.completions.create(messages=CONVERSATIONS[1], **wishes)
        message = reply.choices[0].message.model_dump()
        prompt = PROCESSOR.prompt(CONVERSATIONS[1], thinking=thinking, force_thinking=True)
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == len(prompt.input_ids)
        assert bool(message.get("reasoning_content")) == thinking
        assert bool(message["content"]) != thinking


def video(path: Path) -> Path:
    """Ten frames, each brighter than the one before."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(10):
            pixels = np.full((48, 64, 3), 20 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_a_video(served: Served, tmp_path: Path):
    file = video(tmp_path / "a.mp4")
    url = f"data:video/mp4;base64,{b64encode(file.read_bytes()).decode()}"
    part = {"type": "video_url", "video_url": {"url": url}}
    turns: Any = [{"role": "user", "content": [part, *TAIL]}]
    reply = served.client.chat.completions.create(messages=turns, **GREEDY)
    shown_ = [{"role": "user", "content": [{"type": "video", "path": file}, *TAIL]}]
    (answer,) = expected(shown_)
    assert reply.choices[0].message.content == answer.text
    part["video_url"] = {"url": f"data:video/mp4;base64,{b64encode(b'none').decode()}"}
    with pytest.raises(openai.BadRequestError) as refused:
        served.client.chat.completions.create(messages=turns, **GREEDY)
    assert "'video1'" in str(refused.value)


def test_texts_are_continued(served: Served):
    prompts = ["the quick brown", "one two"]
    reply = served.client.completions.create(prompt=prompts, n=2, seed=3, logprobs=1, **GREEDY)
    engine = Engine(MODEL, PROCESSOR, EngineConfig(num_pages=300, page_tokens=4))
    sampling = SamplingParams(max_tokens=12, ignore_eos=True, seed=3, logprobs=1)
    asked = [tuple(PROCESSOR.tokenizer(text).input_ids) for text in prompts]
    answers = engine.generate(
        Request(prompt=(TextIds(ids),), sampling=sampling, num_samples=2) for ids in asked
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    said = [answer.text for each in answers for answer in each]
    assert [choice.text for choice in reply.choices] == said
    assert reply.choices[0].logprobs is not None
    assert len(reply.choices[0].logprobs.token_logprobs or ()) == 12
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == sum(map(len, asked))
    by_ids = served.client.completions.create(
        prompt=[list(ids) for ids in asked], n=2, seed=3, stream=True, **GREEDY
    )
    texts = ["", "", "", ""]
    for event in by_ids:
        for choice in event.choices:
            texts[choice.index] += choice.text
    assert texts == said


def test_the_best_of_several_continuations(served: Served):
    wishes = GREEDY | {"temperature": 1.5, "seed": 1}
    both = served.client.completions.create(prompt="one", n=6, logprobs=0, **wishes)

    def mean(choice: Any) -> float:
        values = choice.logprobs.token_logprobs
        return sum(values) / len(values)

    ranked = sorted(both.choices, key=mean, reverse=True)
    best = served.client.completions.create(prompt="one", n=2, best_of=6, **wishes)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert best.choices[0].logprobs is None
    assert best.usage is not None
    assert best.usage.completion_tokens == 72


def test_many_clients_at_once_get_their_own_answers(served: Served):
    def ask(number: int) -> str:
        conversation = [{"role": "user", "content": [shown(picture(number)), *TAIL]}]
        if number % 2:
            reply = served.client.chat.completions.create(messages=conversation, **GREEDY)
            return reply.choices[0].message.content or ""
        events = served.client.chat.completions.create(messages=conversation, stream=True, **GREEDY)
        return text_of(events)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(10)))
    for number, text in enumerate(found):
        conversation = [{"role": "user", "content": [shown(picture(number)), *TAIL]}]
        assert text == expected(conversation)[0].text


TAIL = [{"type": "text", "text": "one two three"}]


def test_a_client_that_leaves_a_stream_calls_its_request_off(served: Served):
    wishes = GREEDY | {"max_tokens": 1000}
    stream = served.client.chat.completions.create(messages=CONVERSATIONS[1], stream=True, **wishes)
    next(iter(stream))
    assert served.api.admission.num_open == 1
    stream.close()
    until(lambda: served.api.admission.num_open == 0 and served.api.answers.stats().running == 0)


def test_a_client_that_leaves_before_the_answer_calls_its_request_off(served: Served):
    wishes = GREEDY | {"max_tokens": 1000}
    before = served.api.answers.stats().decoded_tokens
    with pytest.raises(openai.APITimeoutError):
        served.client.with_options(timeout=0.2).chat.completions.create(
            messages=CONVERSATIONS[1], **wishes
        )
    until(lambda: served.api.admission.num_open == 0 and served.api.answers.stats().running == 0)
    assert served.api.answers.stats().decoded_tokens - before < 1000


def test_a_long_stream_ends(served: Served):
    wishes = GREEDY | {"max_tokens": 200}
    events = served.client.chat.completions.create(messages=CONVERSATIONS[1], stream=True, **wishes)
    assert text_of(events) == expected(CONVERSATIONS[1], max_tokens=200)[0].text


def test_the_models_and_the_state(served: Served):
    (model,) = served.client.models.list().data
    assert model.id == NAME
    assert served.client.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError, match="served is 'small'"):
        served.client.models.retrieve("large")
    with pytest.raises(openai.NotFoundError, match="served is 'small'"):
        served.client.chat.completions.create(
            messages=CONVERSATIONS[1], **GREEDY | {"model": "large"}
        )
    base = served.client.with_options(base_url=served.address)
    assert base.get("/health", cast_to=object) == {"status": "ok"}
    assert base.get("/ready", cast_to=object) == {"status": "ready"}


def test_more_requests_than_there_is_room_for_are_refused_for_now():
    with serving(MODEL, PROCESSOR, max_requests=1) as served:
        wishes = GREEDY | {"max_tokens": 1000, "stream": True}
        with served.client.chat.completions.create(messages=CONVERSATIONS[1], **wishes) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as refused:
                served.client.chat.completions.create(messages=CONVERSATIONS[1], **GREEDY)
        assert refused.value.response.headers["retry-after"] == "1"
        until(lambda: served.api.admission.num_open == 0)


def test_a_server_that_is_about_to_stop_takes_nothing():
    with serving(MODEL, PROCESSOR) as served:
        served.api.is_draining = True
        with pytest.raises(openai.InternalServerError, match="about to stop") as refused:
            served.client.chat.completions.create(messages=CONVERSATIONS[1], **GREEDY)
        assert refused.value.status_code == 503


def test_an_answer_that_is_lost_is_an_error_of_the_server():
    model, processor = small_pair()
    model.lm_head.register_forward_hook(fails_late(5))
    with serving(model, processor) as served:
        events = served.client.chat.completions.create(
            messages=CONVERSATIONS[1], stream=True, **GREEDY
        )
        with pytest.raises(openai.APIError, match="no memory"):
            list(events)
        with pytest.raises(openai.InternalServerError, match="no memory"):
            served.client.chat.completions.create(messages=CONVERSATIONS[1], **GREEDY)
        assert served.api.answers.failure is None


def fails_late(number: int) -> Any:
    calls = iter(range(10**9))

    def hook(*_: object) -> None:
        if next(calls) >= number:
            raise RuntimeError("no memory")

    return hook


def test_the_event_loop_answers_while_the_engine_computes():
    model, processor = small_pair()
    hold, entered = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        entered.set()
        hold.wait(20)

    model.lm_head.register_forward_hook(wait)
    with serving(model, processor) as served, ThreadPoolExecutor(1) as pool:
        reply = pool.submit(
            served.client.chat.completions.create, messages=CONVERSATIONS[1], **GREEDY
        )
        try:
            assert entered.wait(20)
            assert served.client.models.list().data
        finally:
            hold.set()
        assert reply.result().choices


def test_metrics_count(served: Served):
    base = served.client.with_options(base_url=served.address)

    def value(name: str) -> float:
        text = base.get("/metrics", cast_to=str)
        (line,) = [each for each in text.splitlines() if each.startswith(f"{name} ")]
        return float(line.rpartition(" ")[2])

    names = (
        'cascadevl_requests_total{route="chat",status="200"}',
        'cascadevl_tokens_total{kind="completion"}',
        'cascadevl_tokens_total{kind="visual"}',
        "cascadevl_engine_decoded_tokens_total",
        'cascadevl_request_seconds_count{route="chat"}',
    )
    before = [value(name) for name in names]
    reply = served.client.chat.completions.create(messages=CONVERSATIONS[0], n=2, **GREEDY)
    assert reply.usage is not None
    visual = reply.usage.prompt_tokens_details.model_dump()["visual_tokens"]
    after = [value(name) for name in names]
    differences = [b - a for a, b in zip(before, after, strict=True)]
    assert differences == [1, 24, visual, 24, 1]
    assert value("cascadevl_open_requests") == 0
