"""Answers that follow a schema, and tools that a model calls, as OpenAI's client sees them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from tests.serving.small_server import (
    CONVERSATIONS,
    GREEDY,
    NAME,
    Served,
    serving,
    small_pair,
    text_of,
)

MODEL, PROCESSOR = small_pair()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(MODEL, PROCESSOR) as server:
        yield server


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
