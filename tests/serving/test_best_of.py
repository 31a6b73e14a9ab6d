"""The best of several answers, and reasoning within a budget, as OpenAI's client asks for them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import count
from typing import Any
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import openai
import pytest
import torch
from openai.types import CompletionUsage
from tests.engine.small_talk import picture
from tests.serving.small_server import NAME, SMALL, Served, serving, shown, small_pair, until

from cascadevl.data.chat import to_messages
from cascadevl.engine.critics import Critics, critics_of
from cascadevl.engine.draws import stream_of
from cascadevl.engine.engine import Engine
from cascadevl.engine.process_reward import SolutionScore
from cascadevl.engine.requests import Completion, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import RequestError
from cascadevl.serving.limits import Limits
from cascadevl.types import Message

MODEL, PROCESSOR = small_pair()
CRITICS = critics_of(MODEL, PROCESSOR)
PICTURE: list[dict[str, Any]] = [
    {"role": "user", "content": [shown(picture(0)), {"type": "text", "text": "what is this?"}]}
]
TEXT: list[dict[str, Any]] = [{"role": "user", "content": "one two"}]
WARM: dict[str, Any] = {"model": NAME, "temperature": 1.5, "max_tokens": 10, "seed": 7}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(MODEL, PROCESSOR, critics=CRITICS) as server:
        yield server


@pytest.fixture(scope="module")
def plain() -> Iterator[Served]:
    """A server without a reward model."""
    with serving(MODEL, PROCESSOR) as server:
        yield server


def drawn(conversation: list[dict[str, Any]], number: int, first: int = 0) -> list[Completion]:
    """What the engine draws in the test's own thread."""
    sampling = SamplingParams(temperature=1.5, max_tokens=10, seed=stream_of(7, first))
    prompt = PROCESSOR.prompt(to_messages(conversation))
    request = Request(prompt=prompt, sampling=sampling, num_samples=number)
    return list(Engine(MODEL, PROCESSOR, SMALL).generate([request])[0])


@pytest.mark.parametrize("select", [None, "prm", "outcome"])
def test_the_best_by_a_reward_model_come_first_with_their_scores(
    served: Served, select: str | None
) -> None:
    extra = {"best_of": 4} | ({} if select is None else {"select": select})
    reply = served.client.chat.completions.create(messages=PICTURE, n=2, extra_body=extra, **WARM)
    answers = drawn(PICTURE, 4)
    scorer = CRITICS.outcome if select == "outcome" else CRITICS.process
    assert scorer is not None
    scores = scorer(to_messages(PICTURE), [each.text for each in answers])
    order = sorted(
        range(4), key=lambda n: (answers[n].finish_reason != "stop", -scores[n].score, n)
    )
    assert [choice.index for choice in reply.choices] == [0, 1]
    for choice, place in zip(reply.choices, order, strict=False):
        fields = choice.model_dump()
        assert choice.message.content == answers[place].text
        assert fields["score"] == pytest.approx(scores[place].score, abs=1e-5)
        steps = fields["step_scores"]
        assert [each["text"] for each in steps] == list(scores[place].steps)
        assert [each["score"] for each in steps] == pytest.approx(
            scores[place].step_scores, abs=1e-5
        )
    assert reply.model_dump()["num_drawn"] == 4
    assert reply.usage is not None
    taken = sum(each.usage.completion_tokens for each in answers)
    assert reply.usage.completion_tokens == taken, "all that were drawn were computed"


def says(text: str) -> tuple[Any, Any]:
    """A model that says a text, whatever it is asked, and its processor."""
    model, processor = small_pair()
    ids = [*processor.tokenizer(text, add_special_tokens=False).input_ids]
    ids.append(processor.stop_token_ids()[0])
    turn = count()

    def scripted(_: object, __: object, logits: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(logits, -1000.0)
        chosen[:, ids[next(turn) % len(ids)]] = 0.0
        return chosen

    model.lm_head.register_forward_hook(scripted)
    return model, processor


def test_a_vote_stops_when_its_leader_cannot_be_overtaken() -> None:
    model, processor = says("Answer: 7")
    with serving(model, processor) as server:
        reply = server.client.chat.completions.create(
            messages=TEXT, extra_body={"best_of": 8, "round_size": 5}, **WARM | {"max_tokens": 20}
        )
    (choice,) = reply.choices
    assert choice.message.content == "Answer: 7"
    assert choice.model_dump()["score"] == 1.0
    assert "step_scores" not in choice.model_dump(exclude_unset=True)
    assert reply.model_dump()["num_drawn"] == 5


class Liking:
    """Likes every answer alike; counts what it was asked."""

    def __init__(self, score: float) -> None:
        self.score, self.asked = score, list[int]()

    def __call__(self, prompt: Sequence[Message], solutions: Sequence[str]) -> list[SolutionScore]:
        self.asked.append(len(solutions))
        return [
            SolutionScore(score=self.score, steps=(text,), step_scores=(self.score,))
            for text in solutions
        ]


@pytest.mark.parametrize(("liked", "rounds"), [(0.9, [2]), (0.5, [2, 2, 1])])
def test_a_good_score_ends_the_drawing(liked: float, rounds: list[int]) -> None:
    model, processor = says("Answer: 7")
    scorer = Liking(liked)
    with serving(model, processor, critics=Critics(process=scorer)) as server:
        extra = {"best_of": 5, "round_size": 2, "stop_score": 0.8}
        reply = server.client.chat.completions.create(
            messages=TEXT, extra_body=extra, **WARM | {"max_tokens": 20}
        )
    assert scorer.asked == rounds
    assert reply.model_dump()["num_drawn"] == sum(rounds)


class Slow(Liking):
    """Takes its time; fails where it likes nothing."""

    def __call__(self, prompt: Sequence[Message], solutions: Sequence[str]) -> list[SolutionScore]:
        time.sleep(0.4)
        if self.score == 0:
            raise RequestError("this is too long to be judged")
        return super().__call__(prompt, solutions)


def sent(server: Served, body: dict[str, Any]) -> Any:
    """The lines of a reply as they come."""
    header = {"Content-Type": "application/json"}
    url = f"{server.address}/v1/chat/completions"
    return urlopen(HttpRequest(url, json.dumps(body).encode(), header), timeout=60)


def pieces_of(events: Sequence[Any], index: int) -> list[Any]:
    """The pieces of one of the answers of a stream."""
    return [one for event in events for one in event.choices if one.index == index]


def test_a_stream_brings_the_best_answers_once_they_are_chosen(served: Served) -> None:
    wishes: dict[str, Any] = WARM | {"n": 2, "logprobs": True, "extra_body": {"best_of": 4}}
    create = served.client.chat.completions.create
    whole = create(messages=PICTURE, **wishes)
    events = list(
        create(messages=PICTURE, stream=True, stream_options={"include_usage": True}, **wishes)
    )
    for choice in whole.choices:
        opening, *pieces, end = pieces_of(events, choice.index)
        assert opening.delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in pieces) == choice.message.content
        assert choice.logprobs is not None
        words = [word for one in pieces if one.logprobs for word in one.logprobs.content]
        assert [word.token for word in words] == [
            word.token for word in choice.logprobs.content or ()
        ]
        assert end.finish_reason == choice.finish_reason
        expected, found = choice.model_dump(), end.model_dump()
        assert found["score"] == pytest.approx(expected["score"], abs=1e-5)
        assert [step["text"] for step in found["step_scores"]] == [
            step["text"] for step in expected["step_scores"]
        ]
    ends = [event for event in events if event.choices and event.choices[0].finish_reason]
    assert [end.choices[0].index for end in ends] == [0, 1], "the best one first"
    assert [end.model_dump()["num_drawn"] for end in ends] == [4, 4]
    assert whole.usage is not None
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_parts_of_the_best_answer_stream_as_parts() -> None:
    model, processor = says("<think>\none\n</think>\n\ntwo three")
    with serving(model, processor) as server:
        events = list(
            server.client.chat.completions.create(
                messages=TEXT,
                stream=True,
                extra_body={"best_of": 3},
                **WARM | {"max_tokens": 40},
            )
        )
    deltas = [one.delta.model_dump() for one in pieces_of(events, 0)]
    assert [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta] == [
        "one"
    ]
    assert "".join(delta["content"] or "" for delta in deltas) == "two three"
    assert events[-1].choices[0].model_dump()["score"] == 1.0


def test_who_waits_for_the_best_is_told_that_it_goes_on() -> None:
    model, processor = says("Answer: 7")
    critics = Critics(process=Slow(0.5))
    body = {"messages": TEXT, "best_of": 2, "stream": True, **WARM | {"max_tokens": 20}}
    with serving(model, processor, critics=critics, keep_alive_s=0.05) as server:
        with closing(sent(server, body)) as reply:
            lines = [line for raw in reply if (line := raw.decode().strip())]
        signs = [line.startswith(":") for line in lines]
        assert sum(signs) >= 2
        assert not any(signs[sum(signs) :]), "once the answer comes, it needs no signs"
        assert lines[-1] == "data: [DONE]"
        events = server.client.chat.completions.create(
            messages=TEXT, stream=True, extra_body={"best_of": 2}, **WARM | {"max_tokens": 20}
        )
        assert "".join(event.choices[0].delta.content or "" for event in events) == "Answer: 7"


def test_a_failure_while_it_is_chosen_has_a_status_or_is_the_last_event() -> None:
    wishes: dict[str, Any] = WARM | {"stream": True, "extra_body": {"best_of": 2}}
    critics = Critics(process=Slow(0.0))
    refused = pytest.raises(openai.BadRequestError, match="too long to be judged")
    with serving(MODEL, PROCESSOR, critics=critics) as server, refused:
        server.client.chat.completions.create(messages=TEXT, **wishes)
    with serving(MODEL, PROCESSOR, critics=critics, keep_alive_s=0.05) as server:
        events = server.client.chat.completions.create(messages=TEXT, **wishes)
        with pytest.raises(openai.APIError, match="too long to be judged"):
            list(events)


def test_who_leaves_before_the_best_is_chosen_holds_nothing() -> None:
    body = {"messages": TEXT, "best_of": 2, "stream": True, **WARM}
    critics = Critics(process=Slow(0.5))
    with serving(MODEL, PROCESSOR, critics=critics, keep_alive_s=0.05) as server:
        with closing(sent(server, body)) as reply:
            assert next(reply).startswith(b":")
            assert server.api.admission.num_open == 1
        until(lambda: server.api.admission.num_open == 0)


@pytest.mark.parametrize("number", [None, 3])
def test_usage_tells_reasoning_from_the_answer(number: int | None) -> None:
    model, processor = says("<think>\none two\n</think>\n\nthree")
    thought = processor.tokenizer("<think>\none two\n</think>", add_special_tokens=False).input_ids
    wishes: dict[str, Any] = WARM | {"max_tokens": 40}
    if number is not None:
        wishes["extra_body"] = {"best_of": number}
    with serving(model, processor) as server:
        create = server.client.chat.completions.create
        reply = create(messages=TEXT, **wishes)
        options = {"include_usage": True}
        events = list(create(messages=TEXT, stream=True, stream_options=options, **wishes))
        older = server.client.completions.create(prompt="one", model=NAME, max_tokens=20)
    for usage in (reply.usage, events[-1].usage):
        assert isinstance(usage, CompletionUsage)
        assert usage.completion_tokens_details is not None
        assert usage.completion_tokens_details.reasoning_tokens == len(thought) * (number or 1)
        assert usage.completion_tokens > len(thought) * (number or 1)
    assert older.usage is not None
    assert older.usage.completion_tokens_details is None, "text is text there"


def test_rounds_draw_from_streams_of_their_own(plain: Served) -> None:
    reply = plain.client.chat.completions.create(
        messages=TEXT, n=3, extra_body={"best_of": 3, "round_size": 2}, **WARM
    )
    texts = {choice.message.content for choice in reply.choices}
    assert texts == {each.text for each in (*drawn(TEXT, 2), *drawn(TEXT, 1, first=2))}


@pytest.mark.parametrize(
    ("wishes", "problem"),
    [
        ({"best_of": 2, "select": "prm"}, "no reward model"),
        ({"best_of": 2, "n": 3}, "best_of is 2, but n is 3"),
        ({"best_of": 2, "temperature": 0}, "would be the same"),
        ({"select": "vote"}, "say with best_of"),
        ({"round_size": 2}, "say with best_of"),
        ({"best_of": 2, "stop_score": 0.5}, "a vote has no scores"),
        ({"best_of": 2, "select": "best"}, "'prm', 'outcome' or 'vote'"),
        ({"thinking": False, "thinking_budget": 3}, "nothing to budget"),
        ({"thinking": True, "thinking_budget": 10}, "at most 10 tokens"),
        ({"thinking_budget": 3, "response_format": {"type": "json_object"}}, "does not reason"),
    ],
)
def test_wishes_that_exclude_each_other_are_refused(
    plain: Served, wishes: dict[str, Any], problem: str
) -> None:
    own = {name: wishes[name] for name in ("n", "stream", "temperature") if name in wishes}
    extra = {name: value for name, value in wishes.items() if name not in own}
    with pytest.raises(openai.BadRequestError, match=problem):
        plain.client.chat.completions.create(messages=TEXT, extra_body=extra, **WARM | own)


def test_all_that_is_drawn_counts_for_the_limit_of_a_request() -> None:
    with serving(MODEL, PROCESSOR, limits=Limits(max_answer_tokens=35)) as server:
        create = server.client.chat.completions.create
        create(messages=TEXT, extra_body={"best_of": 3}, **WARM)
        with pytest.raises(openai.BadRequestError, match="40"):
            create(messages=TEXT, extra_body={"best_of": 4}, **WARM)


def test_a_reward_model_is_not_shown_a_video(served: Served) -> None:
    part = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    asked: Any = [{"role": "user", "content": [part]}]
    with pytest.raises(openai.BadRequestError, match="a video is shown"):
        served.client.chat.completions.create(messages=asked, extra_body={"best_of": 2}, **WARM)


@pytest.mark.parametrize("budget", [0, 1, 4])
def test_reasoning_keeps_within_its_budget_and_the_answer_follows(
    plain: Served, budget: int
) -> None:
    wishes: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 24}
    extra = {"thinking": True, "thinking_budget": budget, "ignore_eos": True}
    create = plain.client.chat.completions.create
    reply = create(messages=TEXT, extra_body=extra, **wishes)
    message = reply.choices[0].message.model_dump()
    prompt = PROCESSOR.prompt(to_messages(TEXT), thinking=True, force_thinking=True)
    free = SamplingParams(max_tokens=max(budget, 1), ignore_eos=True)
    engine = Engine(MODEL, PROCESSOR, SMALL)
    (thought,) = engine.generate([Request(prompt=prompt, sampling=free)])[0]
    reasoning = thought.text if budget else ""
    assert (message.get("reasoning_content") or "") == reasoning.strip("\n")
    assert message["content"]
    assert "</think>" not in message["content"]
    events = list(create(messages=TEXT, stream=True, extra_body=extra, **wishes))
    deltas = [event.choices[0].delta.model_dump() for event in events]
    streamed = "".join(delta.get("reasoning_content") or "" for delta in deltas)
    assert streamed == (message.get("reasoning_content") or "")
    assert "".join(delta["content"] or "" for delta in deltas) == message["content"]


def test_the_document_names_the_fields(plain: Served) -> None:
    client = plain.client.with_options(base_url=plain.address)
    document: Any = client.get("/openapi.json", cast_to=object)
    schemas = document["components"]["schemas"]
    asked = {"thinking", "thinking_budget", "best_of", "select", "round_size", "stop_score"}
    assert asked <= set(schemas["ChatRequest"]["properties"])
    assert {"score", "step_scores"} <= set(schemas["ChatChoice"]["properties"])
    assert "num_drawn" in schemas["ChatCompletion"]["properties"]
