"""Conversations as OpenAI's own client asks them, over a real socket."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import openai
import pytest
from tests.engine.small_talk import picture
from tests.serving.small_server import (
    CONVERSATIONS,
    GREEDY,
    NAME,
    Served,
    engine_says,
    serving,
    shown,
    small_pair,
    text_of,
)

MODEL, PROCESSOR = small_pair()
TAIL = [{"type": "text", "text": "one two three"}]

expected = partial(engine_says, MODEL, PROCESSOR)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(MODEL, PROCESSOR) as server:
        yield server


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


def test_a_long_stream_ends(served: Served):
    wishes = GREEDY | {"max_tokens": 200}
    events = served.client.chat.completions.create(messages=CONVERSATIONS[1], stream=True, **wishes)
    assert text_of(events) == expected(CONVERSATIONS[1], max_tokens=200)[0].text
