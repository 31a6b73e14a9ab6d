"""The server as a stranger meets it: keys, numbers of requests, the log, and too much at once."""

from __future__ import annotations

import http.client
import json
import logging
import socket
from base64 import b64decode
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from tests.engine.small_talk import picture
from tests.serving.small_server import NAME, Served, data_url, serving, shown, small_pair, until
from tests.serving.test_remote import PUBLIC, STORE, names, sends, web

from cascadevl.engine.requests import EngineConfig
from cascadevl.serving.keys import Keys
from cascadevl.serving.logs import JsonLines
from cascadevl.serving.remote import Fetcher, RemoteConfig

MODEL, PROCESSOR = small_pair()
KEY = "sk-" + "k" * 30
TURNS: list[Any] = [{"role": "user", "content": "one"}]
LONG: dict[str, Any] = {
    "model": NAME,
    "messages": TURNS,
    "max_tokens": 1000,
    "stream": True,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Served]:
    listen = {"keys": Keys.of({"ann": KEY, "bob": KEY[::-1] + "x"}), "body_s": 2.0}
    with serving(MODEL, PROCESSOR, listen=listen, max_held_bytes=50_000) as served:
        yield served


def asked(
    served: Served, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content of the answer."""
    connection = http.client.HTTPConnection(urlsplit(served.address).netloc, timeout=30)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def test_a_key_opens_the_door(guarded: Served):
    client = guarded.client.with_options(api_key=KEY)
    assert client.models.list().data[0].id == NAME
    reply = client.chat.completions.create(model=NAME, messages=TURNS, max_tokens=2)
    assert reply.usage is not None


@pytest.mark.parametrize("key", ["none", KEY[:-1], KEY + "k"])
def test_other_keys_do_not(guarded: Served, key: str):
    client = guarded.client.with_options(api_key=key)
    with pytest.raises(openai.AuthenticationError, match="no valid API key") as refused:
        client.chat.completions.create(model=NAME, messages=TURNS)
    assert refused.value.response.headers["www-authenticate"] == "Bearer"
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_without_a_key_only_the_state_is_told(guarded: Served):
    statuses = {
        path: asked(guarded, "GET", path)[0]
        for path in ("/health", "/ready", "/metrics", "/openapi.json", "/docs", "/v1/models", "/x")
    }
    assert {path for path, status in statuses.items() if status == 200} == {"/health", "/ready"}
    assert set(statuses.values()) == {200, 401}
    assert asked(guarded, "GET", "/health/../v1/models")[0] == 401
    assert asked(guarded, "GET", "/ready?/v1/models")[0] == 200


def test_a_key_that_asks_too_often_waits_and_others_do_not():
    listen = {"keys": Keys.of({"ann": KEY, "bob": KEY[::-1] + "x"}), "per_minute": 2}
    with serving(MODEL, PROCESSOR, listen=listen) as served:
        ann = served.client.with_options(api_key=KEY)
        bob = served.client.with_options(api_key=KEY[::-1] + "x")
        wishes: Any = {"model": NAME, "messages": TURNS, "max_tokens": 2}
        for _ in range(2):
            assert ann.chat.completions.create(**wishes).usage is not None
        for _ in range(2):
            with pytest.raises(openai.RateLimitError, match="within a minute") as refused:
                ann.chat.completions.create(**wishes)
            assert 0 < int(refused.value.response.headers["retry-after"]) <= 60
            assert refused.value.code == "rate_limit_exceeded"
        assert ann.models.list().data  # to look is not to ask
        assert bob.chat.completions.create(**wishes).usage is not None
        with pytest.raises(openai.AuthenticationError):
            served.client.chat.completions.create(**wishes)


def test_a_stranger_is_refused_before_the_body_comes(guarded: Served):
    """The length of a body is announced, nothing of it is sent: the answer comes all the same."""
    host, port = urlsplit(guarded.address).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 60000000\r\n"
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 401 ")


def test_a_body_that_is_announced_too_long_is_refused_at_once(guarded: Served):
    host, port = urlsplit(guarded.address).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 600000000\r\n"
        head += f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n\r\n"
        client.sendall(head.encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_bodies_of_all_requests_together(guarded: Served):
    """The limit of this server is 50,000 bytes for all that is in hand."""
    large = {"model": NAME, "messages": [{"role": "user", "content": "one " * 15_000}]}
    status, headers, content = asked(
        guarded,
        "POST",
        "/v1/chat/completions",
        json.dumps(large).encode(),
        Authorization=f"Bearer {KEY}",
        Content_Type="application/json",
    )
    assert (status, headers["retry-after"]) == (429, "1")
    assert json.loads(content)["error"]["code"] == "too_many_requests"
    assert guarded.api.admission.num_held_bytes == guarded.api.admission.num_open == 0


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("my-id_1.2", True), ("a" * 64, True), ("a" * 65, False), ("a b", False), ("", False)],
)
def test_every_answer_has_a_number(guarded: Served, given: str, is_kept: bool):
    for path in ("/health", "/v1/models"):
        _, headers, _ = asked(guarded, "GET", path, X_Request_Id=given)
        assert (headers["x-request-id"] == given) == is_kept
        assert is_kept or headers["x-request-id"].startswith("req_")


def test_the_log_tells_who_asked_what_and_nothing_of_what_was_said(
    guarded: Served, caplog: pytest.LogCaptureFixture
):
    part = shown(picture(7))
    secret = "one two three four"
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": [part, {"type": "text", "text": secret}]}],
        "max_tokens": 5,
        "stream": True,
    }
    with caplog.at_level(logging.INFO, "cascadevl"):
        for content in (json.dumps(body).encode(), json.dumps({**body, "n": 0}).encode()):
            asked(
                guarded,
                "POST",
                "/v1/chat/completions?secret=1",
                content,
                Authorization=f"Bearer {KEY}",
                Content_Type="application/json",
                X_Request_Id="mine",
            )
        asked(guarded, "GET", "/v1/models", Authorization="Bearer wrong", X_Request_Id="mine")

        def lines_of_mine() -> list[dict[str, Any]]:
            whole = [json.loads(JsonLines().format(record)) for record in caplog.records]
            return [line for line in whole if line.get("request_id") == "mine"]

        # The line of a stream is written after its client has read the last of it, so that one of
        # a test before may come now, too.
        until(lambda: len(lines_of_mine()) == 3)
    lines = sorted(lines_of_mine(), key=lambda line: int(line["status"]))
    whole = json.dumps(lines)
    assert [line["status"] for line in lines] == [200, 400, 401]
    assert [line["key"] for line in lines] == ["ann", "ann", None]
    assert [line["path"] for line in lines] == ["/v1/chat/completions"] * 2 + ["/v1/models"]
    assert lines[0]["bytes_in"] == len(json.dumps(body))
    assert lines[0]["bytes_out"] > 100
    for word in (secret, part["image_url"]["url"][30:60], KEY, "secret"):
        assert word not in whole


def test_an_error_of_ours_is_in_the_log_and_not_in_the_answer(
    guarded: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Any) -> None:
        raise KeyError(data_url(picture(7)))

    monkeypatch.setattr(guarded.api.admission, "take", broken)
    status, headers, content = asked(
        guarded, "POST", "/v1/completions", b"{}", Authorization=f"Bearer {KEY}"
    )
    assert status == 500
    assert b"KeyError" not in content
    assert headers["x-request-id"].startswith("req_")
    whole = "\n".join(JsonLines().format(record) for record in caplog.records)
    assert "KeyError" in whole
    assert "base64," not in whole


def test_answers_that_wait_are_limited():
    """One answer is computed at a time; the second waits, and the third is sent away."""
    config = EngineConfig(num_pages=400, page_tokens=4, max_running=1)
    with serving(MODEL, PROCESSOR, config, max_waiting=1) as served:
        with served.client.chat.completions.create(**LONG) as first:
            next(iter(first))
            body = json.dumps({"model": NAME, "messages": TURNS, "max_tokens": 2}).encode()
            netloc = urlsplit(served.address).netloc
            second = http.client.HTTPConnection(netloc, timeout=30)
            second.request(
                "POST", "/v1/chat/completions", body, {"Content-Type": "application/json"}
            )
            while not served.api.answers.stats().waiting:
                pass
            with pytest.raises(openai.RateLimitError, match="1 answers wait") as refused:
                served.client.chat.completions.create(model=NAME, messages=TURNS)
            assert refused.value.response.headers["retry-after"] == "1"
        assert second.getresponse().status == 200
        second.close()


def test_a_picture_by_its_address_is_the_picture():
    content = b64decode(data_url(picture(3)).partition(",")[2])
    with web() as found:
        found.answers["/picture"] = sends(content)
        config = RemoteConfig(hosts=(f"store.test:{found.port}",), networks=(STORE,))
        fetcher = Fetcher(config, names(store_test=[PUBLIC]))
        with serving(MODEL, PROCESSOR, fetcher=fetcher) as served:

            def answer(url: str) -> str | None:
                parts: Any = [{"type": "image_url", "image_url": {"url": url}}] * 2
                reply = served.client.chat.completions.create(
                    model=NAME,
                    messages=[{"role": "user", "content": parts}],
                    max_tokens=8,
                    temperature=0,
                )
                return reply.choices[0].message.content

            assert answer(found.url("store.test")) == answer(data_url(picture(3)))
            assert len(found.seen) == 1, "shown twice, fetched once"
            found.answers["/picture"] = sends(b"<html>")
            with pytest.raises(openai.BadRequestError, match="no picture"):
                answer(found.url("store.test"))
            with pytest.raises(openai.BadRequestError, match=r"does not fetch from 127\.0\.0\.1"):
                answer(f"http://127.0.0.1:{found.port}/picture")
            found.answers["/picture"] = sends(b"")
            with pytest.raises(openai.BadRequestError, match="nothing at the address"):
                answer(found.url("store.test"))
        with (
            serving(MODEL, PROCESSOR) as served,
            pytest.raises(openai.BadRequestError, match="only data URLs"),
        ):
            answer(found.url("store.test"))
