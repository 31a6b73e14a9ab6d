from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadevl.data.conversation import split_thinking
from cascadevl.serving.answer_parts import (
    AnswerParts,
    CallArguments,
    CallName,
    Content,
    Piece,
    ToolCallText,
    joined,
)


def taken_apart(text: str, size: int = 10**6, **how: Any) -> list[Piece]:
    parts = AnswerParts(**how)
    pieces = [
        piece
        for start in range(0, len(text), size)
        for piece in parts.push(text[start : start + size])
    ]
    return pieces + parts.flush()


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_reasoning_and_what_is_said(size: int):
    whole = joined(taken_apart("<think>\nIt is\nred.\n</think>\n\nRed.\n", size))
    assert (whole.reasoning, whole.content) == ("It is\nred.", "Red.\n")


def test_reasoning_that_the_prompt_has_opened():
    whole = joined(taken_apart("It is red.\n</think>\n\nRed.", begins_thinking=True))
    assert (whole.reasoning, whole.content) == ("It is red.", "Red.")


def test_reasoning_that_was_cut_short_is_not_said():
    whole = joined(taken_apart("<think>\nIt is </th"))
    assert (whole.reasoning, whole.content) == ("It is </th", "")


@pytest.mark.parametrize("text", ["", " <thi", "a <think>b</think>", "<tool_call>", "\n\na\n", "<"])
def test_other_text_is_said_as_it_is(text: str):
    assert joined(taken_apart(text, 1)).content == text


WORDS = st.sampled_from(["<", "/", "think>", "a", "\n", "</think>", " "])
LETTERS = st.lists(WORDS, max_size=30).map("".join)


@given(LETTERS, st.integers(1, 9))
def test_a_stream_says_what_the_whole_answer_says(text: str, size: int):
    text = f"<think>{text}"
    whole = joined(taken_apart(text, size))
    assert (whole.reasoning, whole.content) == split_thinking(text)


CALL = {"name": "find", "arguments": {"text": 'a "}" </tool> {', "n": [1, {"a": 2}]}}


def written(call: object) -> str:
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_calls_are_found_and_the_line_breaks_around_them_dropped(size: int):
    text = f"I look.\n{written(CALL)}\n{written({'name': 'b', 'arguments': {}})}\n"
    whole = joined(taken_apart(text, size, calls=True))
    assert whole.content == "I look."
    assert [(call.name, json.loads(call.arguments)) for call in whole.calls] == [
        ("find", CALL["arguments"]),
        ("b", {}),
    ]


def test_arguments_come_while_they_are_written():
    parts = AnswerParts(calls=True)
    assert parts.push('<tool_call>{"name": "f", "argu') == []
    assert parts.push('ments": {"a"') == [CallName(0, "f"), CallArguments(0, '{"a"')]
    assert parts.push(': "x}') == [CallArguments(0, ': "x}')]
    assert parts.push('"}}\n</tool_call>') == [CallArguments(0, '"}')]
    assert parts.flush() == []


@pytest.mark.parametrize(
    "call",
    [
        {"arguments": {"a": 1}, "name": "f"},
        {"name": "f", "arguments": '{"a": 1}'},
        {"name": "f", "parameters": {"a": 1}},
    ],
)
def test_calls_in_other_orders_and_forms(call: object):
    (found,) = joined(taken_apart(written(call), 2, calls=True)).calls
    assert (found.name, json.loads(found.arguments)) == ("f", {"a": 1})


@pytest.mark.parametrize("text", ["<tool_call>no JSON</tool_call> b\n", "<tool_call>[1]", "a<tool"])
def test_what_is_no_call_is_said(text: str):
    whole = joined(taken_apart(text, 3, calls=True))
    assert (whole.content, whole.calls) == (text, ())


def test_a_call_that_was_cut_short_has_the_arguments_so_far():
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1'
    assert joined(taken_apart(text, 4, calls=True)).calls == (ToolCallText("f", '{"a": 1'),)


def test_calls_are_text_where_no_tools_were_given():
    assert taken_apart(written(CALL)) == [Content(written(CALL))]


@pytest.mark.parametrize("size", [1, 1000])
def test_an_answer_that_is_one_call(size: int):
    whole = joined(taken_apart(json.dumps(CALL), size, is_call=True))
    assert json.loads(whole.calls[0].arguments) == CALL["arguments"]
    assert (whole.content, len(whole.calls)) == ("", 1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=30)
@given(st.dictionaries(st.text(), JSON, max_size=4), st.integers(1, 9), st.booleans())
def test_any_arguments_come_through(arguments: dict[str, Any], size: int, is_ascii: bool):
    call = {"name": "f", "arguments": arguments}
    text = f"<tool_call>\n{json.dumps(call, ensure_ascii=is_ascii)}\n</tool_call>"
    if "</tool_call>" in json.dumps(arguments):
        return
    (found,) = joined(taken_apart(text, size, calls=True)).calls
    assert json.loads(found.arguments) == arguments
