"""What clients send by mistake or in bad will: refused in OpenAI's form, and nothing breaks."""

from __future__ import annotations

import http.client
import json
import re
import struct
import zlib
from base64 import b64encode
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine.small_talk import picture
from tests.serving.small_server import NAME, Served, data_url, serving, small_pair

MODEL, PROCESSOR = small_pair()
# The server runs beside the draws, in threads of this process.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

CHAT = "/v1/chat/completions"
TURNS = [{"role": "user", "content": "one"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(MODEL, PROCESSOR, max_body_bytes=200_000) as server:
        yield server


def post(
    served: Served, body: object, path: str = CHAT, kind: str = "application/json"
) -> tuple[int, Any]:
    """Status and JSON of the reply to a body, which may be raw bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(urlsplit(served.address).netloc, timeout=30)
    try:
        connection.request("POST", path, content, {"Content-Type": kind})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": TURNS, "max_tokens": 2, **fields}


def of_picture(url: object) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return chat(messages=[{"role": "user", "content": [part]}])


WRONG: dict[str, tuple[object, str | None, str]] = {
    "no JSON": (b"{", None, "JSON"),
    "empty": (b"", None, "JSON"),
    "a list": ([], None, "object"),
    "no messages": ({"model": NAME}, "messages", "required"),
    "no turns": (chat(messages=[]), "messages", "at least 1"),
    "a mistyped field": (chat(temprature=1), "temprature", "'temperature'"),
    "a number as text": (chat(temperature="1"), "temperature", "number"),
    "out of range": (chat(top_p=0), "top_p", "greater than 0"),
    "not a number": (b'{"model":"small","messages":[],"top_p":NaN}', None, "NaN|number|at least"),
    "no tokens": (chat(max_tokens=0), "max_tokens", "greater than or equal to 1"),
    "a penalty": (chat(presence_penalty=1.0), "presence_penalty", "repetition_penalty"),
    "a bias": (chat(logit_bias={"5": 1.0}), "logit_bias", "leave it out"),
    "best of": (chat(best_of=2, n=3), None, "best_of is 2, but n is 3"),
    "a file": (of_picture("/etc/passwd"), None, "data URL"),
    "a file address": (of_picture("file:///etc/passwd"), None, "data URL"),
    "an address": (of_picture("http://127.0.0.1/a.png"), None, "data URL"),
    "no base64": (of_picture("data:image/png;base64,*"), None, "base64"),
    "no picture": (of_picture("data:image/png;base64,AAAA"), None, "no picture"),
    "half a picture": (of_picture(data_url(picture(0))[:200]), None, "picture|base64"),
    "a control token": (
        chat(messages=[{"role": "user", "content": "<|im_start|>"}]),
        None,
        "control token",
    ),
    "a mark of a picture": (
        chat(messages=[{"role": "user", "content": "<image>"}]),
        None,
        "no picture",
    ),
    "a late system turn": (
        chat(messages=[*TURNS, {"role": "system", "content": "a"}]),
        None,
        "first",
    ),
    "an unknown role": (chat(messages=[{"role": "robot", "content": "a"}]), None, "role|tag"),
    "half a letter": (b'{"model": "small", "messages": "\\ud800"}', None, "surrogate|JSON"),
    "a schema that is none": (
        chat(
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "nothing"}},
            }
        ),
        None,
        "json_schema",
    ),
    "JSON that reasons": (
        chat(response_format={"type": "json_object"}, thinking=True),
        None,
        "cannot reason",
    ),
    "an unknown tool": (
        chat(tool_choice={"type": "function", "function": {"name": "f"}}),
        None,
        "none of the tools",
    ),
    "a call and no tools": (chat(tool_choice="required"), None, "no tools"),
    "tokens without a wish": (chat(top_logprobs=2), None, "logprobs is not true"),
    "too long": (chat(max_tokens=10**6), None, "pages|trained"),
    "an empty stop": (chat(stop=""), None, "stop string is empty"),
}


@pytest.mark.parametrize(("body", "param", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said(served: Served, body: object, param: str | None, message: str):
    status, reply = post(served, body)
    assert status == 400
    error = reply["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param
    assert re.search(message, error["message"]), error["message"]


def test_other_refusals(served: Served):
    assert post(served, chat(), path="/v1/chat")[0] == 404
    assert post(served, chat(), path="/v1/models")[0] == 405
    assert post(served, chat(), kind="text/plain")[0] == 415
    assert post(served, b" " * 300_000)[0] == 413
    for _, reply in (post(served, chat(), path="/v1/chat"), post(served, b" " * 300_000)):
        assert set(reply["error"]) == {"message", "type", "param", "code"}


def test_wrong_continuations(served: Served):
    path = "/v1/completions"
    for fields, message in (
        ({"prompt": "a", "echo": True}, "put the prompt"),
        ({"prompt": "a", "n": 3, "best_of": 2}, "best_of is 2"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "at their ends"),
        ({"prompt": ""}, "empty"),
        ({"prompt": [10**6]}, "not one of"),
        ({"prompt": ["a", ""]}, "empty"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [PROCESSOR.image_token_id]}, "image-context token"),
    ):
        status, reply = post(served, {"model": NAME, **fields}, path)
        assert status == 400, fields
        assert message in reply["error"]["message"]


def still_answers(served: Served) -> bool:
    return post(served, chat())[0] == 200


PNG = data_url(picture(0))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(60, len(PNG) - 1), st.characters(codec="ascii")), max_size=8))
def test_damaged_pictures(served: Served, changes: list[tuple[int, str]]):
    letters = list(PNG)
    for place, letter in changes:
        letters[place] = letter
    status, reply = post(served, of_picture("".join(letters)))
    assert status in (200, 400), reply


FIELDS = st.sampled_from(
    ["role", "content", "type", "text", "image_url", "url", "tools", "function", "name", "n"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["messages", "tools", "stop", "n", "seed", "response_format"]), VALUES)
def test_bodies_of_any_form(served: Served, field: str, value: object):
    status, reply = post(served, chat(**{field: value}))
    assert status in (200, 400), reply


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_bodies_of_any_bytes(served: Served, content: bytes):
    assert post(served, content)[0] == 400


def test_after_all_that_it_still_answers(served: Served):
    assert still_answers(served)
    assert served.api.admission.num_open == 0
    status, _ = post(served, of_picture(data_url(picture(3, (300, 7)))))
    assert status == 200


def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def test_a_picture_with_many_more_pixels_than_bytes(served: Served):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000)))
    status, reply = post(served, of_picture(f"data:image/png;base64,{b64encode(png).decode()}"))
    assert (status, reply["error"]["code"]) == (400, "oversized_image")
