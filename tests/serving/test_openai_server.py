"""The server around the answers: who leaves, who is refused, what fails, and what is counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from tests.serving.small_server import (
    CONVERSATIONS,
    GREEDY,
    NAME,
    Served,
    serving,
    small_pair,
    until,
)

MODEL, PROCESSOR = small_pair()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(MODEL, PROCESSOR) as server:
        yield server


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
    served.client.chat.completions.create(messages=CONVERSATIONS[0], **GREEDY)  # names begin so
    before = [value(name) for name in names]
    reply = served.client.chat.completions.create(messages=CONVERSATIONS[0], n=2, **GREEDY)
    assert reply.usage is not None
    visual = reply.usage.prompt_tokens_details.model_dump()["visual_tokens"]
    after = [value(name) for name in names]
    differences = [b - a for a, b in zip(before, after, strict=True)]
    assert differences == [1, 24, visual, 24, 1]
    assert value("cascadevl_open_requests") == 0
