"""Pictures, bodies and headers made to do harm: each is refused or answered, and nobody waits."""

from __future__ import annotations

import http.client
import io
import json
import random
import struct
import threading
import time
import zlib
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import PIL.Image
import pytest
from tests.engine.small_talk import picture
from tests.serving.small_server import NAME, Served, serving, small_pair

MODEL, PROCESSOR = small_pair()
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
MOST_S = 20.0
"""A request is answered within this time, and the state of the server is told meanwhile."""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(MODEL, PROCESSOR, max_body_bytes=3_000_000) as server, watched(server):
        yield server
        assert server.api.admission.num_open == server.api.admission.num_held_bytes == 0


@contextmanager
def watched(served: Served) -> Iterator[None]:
    """Ask for the state all the time: it must be told at once, whatever else comes."""
    done, latencies = threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.05):
            start = time.monotonic()
            assert sent(served, "GET", "/health")[0] == 200
            latencies.append(time.monotonic() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    assert len(latencies) > 1, "the state was not told"
    assert max(latencies) < MOST_S


def sent(
    served: Served, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(served.address).netloc, timeout=MOST_S)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def check(status: int, content: bytes, *also: int) -> None:
    """An answer, or a refusal in OpenAI's form."""
    assert status in (200, *range(400, 500), *also), content
    if status != 200:
        assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}


def ask(served: Served, **fields: Any) -> tuple[int, bytes]:
    turns = [{"role": "user", "content": "one"}]
    body = {"model": NAME, "messages": turns, "max_tokens": 2, **fields}
    return sent(served, "POST", CHAT, json.dumps(body).encode(), **JSON)


def ask_about(served: Served, content: bytes, kind: str = "image") -> tuple[int, bytes]:
    url = f"data:{kind}/x;base64,{b64encode(content).decode()}"
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
    return ask(served, messages=[{"role": "user", "content": [part]}])


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IEND", b"")


def gif(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\x00;"


def tiff(width: int, height: int, next_: int = 0) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (279, 2**31)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (
        b"II*\x00\x08\x00\x00\x00"
        + struct.pack("<H", len(tags))
        + entries
        + struct.pack("<I", next_)
    )


PIXELS = chunk(b"IDAT", zlib.compress(bytes(2_000_000)))
PICTURES: dict[str, bytes] = {
    "nothing": b"",
    "zeros": bytes(1000),
    "many pixels": png(60_000, 60_000, PIXELS),
    "a wide line": png(90_000_000, 1, PIXELS),
    "no pixels": png(0, 0),
    "the largest numbers": png(2**31 - 1, 2**31 - 1, PIXELS),
    "no content": png(100, 100),
    "less than promised": png(5000, 5000, chunk(b"IDAT", zlib.compress(bytes(10)))),
    "more than promised": png(1, 1, PIXELS),
    "text that unpacks": png(
        4, 4, chunk(b"zTXt", b"a\x00\x00" + zlib.compress(bytes(200_000_000), 9)), PIXELS
    ),
    "a profile that unpacks": png(
        4, 4, chunk(b"iCCP", b"a\x00\x00" + zlib.compress(bytes(200_000_000), 9)), PIXELS
    ),
    "many chunks": png(4, 4, *[chunk(b"tEXt", b"a\x00b")] * 50_000),
    "frames that are not there": png(4, 4, chunk(b"acTL", struct.pack(">II", 2**31, 0)), PIXELS),
    "a strange depth": png(4, 4, PIXELS, depth=3, colour=7),
    "a frame larger than its screen": gif((1, 1), (65_535, 65_535)),
    "a large screen": gif((65_535, 65_535), (1, 1)),
    "a large map of pixels": tiff(2**20, 2**20),
    "a directory that points to itself": tiff(4, 4, next_=8),
    "BMP upside down": b"BM" + struct.pack("<IHHIIiiHHI", 70, 0, 0, 54, 40, 9, -(2**31), 1, 24, 0),
    "PPM of many digits": b"P6 " + b"9" * 100_000 + b" 1 255\n",
    "PPM large": b"P6 100000 100000 255\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    "PDF": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n",
    "SVG": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
    "HTML": b"<html><script>alert(1)</script></html>",
    "an archive": b"PK\x03\x04" + bytes(30),
    "a JPEG of 65535 squared": b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x11\x00"
    b"\x02\x11\x01\x03\x11\x01\xff\xd9",
    "a playlist": b"#EXTM3U\nfile:///etc/passwd\nhttp://127.0.0.1/\n",
}


@pytest.mark.parametrize("content", PICTURES.values(), ids=PICTURES)
def test_pictures_made_to_do_harm(served: Served, content: bytes):
    status, reply = ask_about(served, content)
    check(status, reply)


VIDEOS = ("a playlist", "zeros", "HTML", "a frame larger than its screen", "nothing", "SVG")


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_made_to_do_harm(served: Served, name: str):
    status, reply = ask_about(served, PICTURES[name], "video")
    assert status == 400 or PICTURES[name].startswith(b"GIF")
    check(status, reply)
    assert b"/tmp" not in reply


FORMATS = ("png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm", "jpeg2000", "avif")


def damaged(format_: str, rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    picture(rng.randrange(9), (40, 30)).save(buffer, format_)
    content = bytearray(buffer.getvalue())
    for _ in range(rng.randrange(1, 12)):
        place = rng.randrange(min(len(content), 200) if rng.random() < 0.7 else len(content))
        content[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    if rng.random() < 0.3:
        del content[rng.randrange(len(content)) :]
    return bytes(content)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("number", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_pictures_of_every_format(served: Served, format_: str, number: int):
    rng = random.Random(format_)
    statuses = set()
    for _ in range(number):
        status, reply = ask_about(served, damaged(format_, rng))
        check(status, reply)
        statuses.add(status)
    assert 400 in statuses or format_ in ("bmp", "ppm"), "nothing was damaged enough to be noticed"


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
    status, reply = sent(served, "POST", path, content, **JSON)
    check(status, reply)


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
    check(*ask(served, messages=[{"role": "user", "content": text}]))


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
    status, reply = ask(served, response_format={"type": "json_schema", "json_schema": named})
    check(status, reply)
    function = {"type": "function", "function": {"name": "f", "parameters": schema}}
    check(*ask(served, tools=[function], tool_choice="required"))


def test_a_schema_that_cannot_be_followed_ends_its_own_answer_alone(served: Served):
    wishes = {"model": NAME, "messages": [{"role": "user", "content": "one"}], "max_tokens": 200}
    with served.client.chat.completions.create(
        **wishes, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        events = iter(stream)
        next(events)
        named = {"name": "a", "schema": SCHEMAS["any of many"]}
        format_ = {"type": "json_schema", "json_schema": named}
        status, reply = ask(served, max_tokens=50, response_format=format_)
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
    status, content = sent(served, method, path)
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
    status, content = sent(served, "POST", CHAT, f"{TEXT}}}".encode(), **headers)
    check(status, content)


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
        check(*sent(served, "POST", CHAT, bytes(content), **JSON))


def test_after_all_that_it_answers(served: Served):
    assert ask(served)[0] == 200
    buffer = io.BytesIO()
    picture(1).save(buffer, "png")
    assert ask_about(served, buffer.getvalue())[0] == 200
    assert served.api.answers.failure is None
