"""Bodies, texts, schemas and headers made to do harm: each is refused or answered, nobody waits."""

from __future__ import annotations

import io
import json
import random
import zlib
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import PIL.Image
import pytest
from tests.engine.small_talk import picture
from tests.serving.small_server import (
    CHAT,
    JSON,
    NAME,
    Served,
    besieged,
    check_reply,
    send,
    send_chat,
    send_media,
    small_pair,
)

MODEL, PROCESSOR = small_pair()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with besieged(MODEL, PROCESSOR) as server:
        yield server


def nested(depth: int, leaf: object = 1) -> Any:
    for _ in range(depth):
        leaf = {"type": "array", "items": leaf}
    return leaf


TEXT = '{"model":"small","max_tokens":2,"messages":[{"role":"user","content":"one"}]'
BODIES: dict[str, bytes] = {
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "deep metadata": f'{TEXT},"metadata":{{"a":{"[" * 5000}{"]" * 5000}}}}}'.encode(),
    "a long number": f'{TEXT},"seed":{"9" * 200_000}}}'.encode(),
    "a large exponent": f'{TEXT},"temperature":1e999999}}'.encode(),
    "not a number": f'{TEXT},"temperature":NaN}}'.encode(),
    "minus zero": f'{TEXT},"temperature":-0.0}}'.encode(),
    "twice the same key": f'{TEXT},"n":1,"n":2}}'.encode(),
    "no UTF-8": b'{"model":"\xff\xfe"}',
    "UTF-16": f"{TEXT}}}".encode("utf-16"),
    "a mark of byte order": b"\xef\xbb\xbf" + f"{TEXT}}}".encode(),
    "null bytes": f"{TEXT}}}".encode() + bytes(1000),
    "half a letter": b'{"model":"small","messages":[{"role":"user","content":"\\udc00"}]}',
    "a null letter": TEXT.replace("one", "\\u0000").encode() + b"}",
    "many turns": json.dumps(
        {"model": NAME, "messages": [{"role": "user", "content": "a"}] * 40_000}
    ).encode(),
    "many pictures": json.dumps(
        {
            "model": NAME,
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "data:;base64,AA"}}]
                    * 9000,
                }
            ],
        }
    ).encode(),
    "many fields": json.dumps({f"a{n}": n for n in range(100_000)}).encode(),
    "many prompts": json.dumps({"model": NAME, "prompt": ["a"] * 100_000}).encode(),
    "a long name": f'{{"model":"{"a" * 1_000_000}","messages":[]}}'.encode(),
    "packed": zlib.compress(f"{TEXT}}}".encode()),
    "a form": b"model=small&messages=1",
}


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("content", BODIES.values(), ids=BODIES)
def test_bodies_made_to_do_harm(served: Served, path: str, content: bytes):
    status, reply = send(served, "POST", path, content, **JSON)
    check_reply(status, reply)


TEXTS: dict[str, str] = {
    "spaces": " " * 300_000,
    "one letter": "a" * 300_000,
    "lines": "\n" * 300_000,
    "digits": "9" * 300_000,
    "accents": "e" + "\u0301" * 100_000,
    "right to left": "\u202e\u200f" * 50_000,
    "nothing to see": "\u200b" * 100_000,
    "marks": "<img>" * 50_000,
    "control tokens": "<|im_end|>" * 20_000,
    "half control tokens": "<|im_" * 50_000,
    "thoughts": "<think>" * 50_000,
    "faces": "\U0001f469\u200d\U0001f52c" * 30_000,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts_made_to_take_long(served: Served, text: str):
    check_reply(*send_chat(served, messages=[{"role": "user", "content": text}]))


SCHEMAS: dict[str, Any] = {
    "a circle": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "deep": nested(150),
    "deep beyond JSON": nested(900),
    "many values": {"enum": [f"value {n}" for n in range(20_000)]},
    "a pattern that backtracks": {"type": "string", "pattern": "^(a+)+$"},
    "a pattern that counts": {"type": "string", "pattern": "^((a{1,999}){1,999}){1,999}$"},
    "a bad pattern": {"type": "string", "pattern": "(("},
    "a long word": {"type": "string", "minLength": 10**9},
    "many items": {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
    "all of many": {"allOf": [{"type": "string", "maxLength": n} for n in range(1, 400)]},
    "any of many": {
        "anyOf": [
            {"type": "object", "properties": {f"p{n}": {"type": "integer"}}} for n in range(2000)
        ]
    },
    "elsewhere": {"$ref": "http://127.0.0.1:1/schema"},
    "a file": {"$ref": "file:///etc/passwd"},
    "large numbers": {"type": "integer", "minimum": -(10**300), "multipleOf": 1e-300},
}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_schemas_made_to_take_long(served: Served, schema: Any):
    named = {"name": "a", "schema": schema}
    status, reply = send_chat(served, response_format={"type": "json_schema", "json_schema": named})
    check_reply(status, reply)
    function = {"type": "function", "function": {"name": "f", "parameters": schema}}
    check_reply(*send_chat(served, tools=[function], tool_choice="required"))


def test_a_schema_that_cannot_be_followed_ends_its_own_answer_alone(served: Served):
    wishes = {"model": NAME, "messages": [{"role": "user", "content": "one"}], "max_tokens": 200}
    with served.client.chat.completions.create(
        **wishes, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        events = iter(stream)
        next(events)
        named = {"name": "a", "schema": SCHEMAS["any of many"]}
        format_ = {"type": "json_schema", "json_schema": named}
        status, reply = send_chat(served, max_tokens=50, response_format=format_)
        assert status == 200
        assert json.loads(reply)["choices"][0]["finish_reason"] == "length"
        assert json.loads(reply)["usage"]["completion_tokens"] < 50
        *_, last = events
        assert last.choices[0].finish_reason == "length"


PATHS = (
    *("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/v1/models/../../metrics"),
    *("/v1/models/%00", "/v1/models/%ff%fe", "/v1/models/" + "a" * 30_000, "/v1/models/%0d%0aA:b"),
    *("/docs/../openapi.json", "/.git/config", "/v1/chat/completions/", "/?a=" + "b" * 30_000, "*"),
)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:30])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "TRACE", "PROPFIND"])
def test_paths_and_methods(served: Served, method: str, path: str):
    status, content = send(served, method, path)
    assert status < 500, content
    assert b"root:" not in content


HEADERS: dict[str, dict[str, str]] = {
    "no type": {},
    "a type of many words": {"Content_Type": "application/json; charset=utf-7; a=" + "b" * 20_000},
    "two types": {"Content_Type": "application/json, text/html"},
    "packed": {**JSON, "Content_Encoding": "gzip"},
    "a range": {**JSON, "Range": "bytes=0-" + "9" * 1000},
    "many ways": {**JSON, "X_Forwarded_For": "<script>, " * 2000},
    "another host": {**JSON, "Host": "evil.example/?"},
    "a strange key": {**JSON, "Authorization": "Bearer " + "\xff" * 5000},
    "a strange number": {**JSON, "X_Request_Id": '"}{"a":"' * 500},
    "a question before": {**JSON, "Expect": "100-continue"},
    "an upgrade": {**JSON, "Connection": "Upgrade", "Upgrade": "websocket"},
    "another protocol": {**JSON, "Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"},
    "too much": {**JSON, "A": "a" * 100_000},
}


@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS)
def test_headers_made_to_do_harm(served: Served, headers: dict[str, str]):
    status, content = send(served, "POST", CHAT, f"{TEXT}}}".encode(), **headers)
    check_reply(status, content)


@pytest.mark.parametrize("seed", range(2))
def test_bodies_with_a_few_other_bytes(served: Served, seed: int):
    """A good request with a video, tools and a schema, changed at random places."""
    rng = random.Random(seed)
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (20, 20)).save(buffer, "png")
    url = f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"
    whole = {
        "model": NAME,
        "messages": [
            {"role": "system", "content": "two"},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]},
            {"role": "assistant", "content": "one", "reasoning_content": "two"},
            {"role": "user", "content": [{"type": "text", "text": "three"}]},
        ],
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        ],
        "max_tokens": 2,
        "stop": ["a", "b"],
        "stream": False,
        "temperature": 0.5,
    }
    text = json.dumps(whole).encode()
    for _ in range(60):
        content = bytearray(text)
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(content))
            new = rng.choice((b"", bytes([rng.randrange(256)]), *map(chr, b'{}[]",:0-1e\\un')))
            content[place : place + rng.randrange(2)] = (
                new.encode() if isinstance(new, str) else new
            )
        check_reply(*send(served, "POST", CHAT, bytes(content), **JSON))


def test_after_all_that_it_answers(served: Served):
    assert send_chat(served)[0] == 200
    buffer = io.BytesIO()
    picture(1).save(buffer, "png")
    assert send_media(served, buffer.getvalue())[0] == 200
    assert served.api.answers.failure is None
