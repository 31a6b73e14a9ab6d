"""Clients that send slowly, read slowly, or send what is no HTTP: others go on meanwhile."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import uvicorn

from cascadevl.serving.connection import ConnectionConfig

CHUNK, NUM_CHUNKS = bytes(2**16), 120
HEAD = b"GET / HTTP/1.1\r\nHost: a\r\n"


class App:
    """Reads a body, then sends more than any buffer holds, as fast as the client reads."""

    def __init__(self) -> None:
        self.num_sent = self.num_asked = 0
        self.ended = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.num_asked += 1
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        many = scope["path"] == "/many"
        gone = asyncio.ensure_future(receive())
        while many and self.num_sent < NUM_CHUNKS and not gone.done():
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
            self.num_sent += 1
        gone.cancel()
        await send({"type": "http.response.body", "body": b"all"})
        if many:
            self.ended.set()


@contextmanager
def running(**patience: float) -> Iterator[tuple[App, int]]:
    app = App()
    settings = {"head_s": 20.0, "body_s": 20.0, "unread_s": 20.0, **patience}
    config = ConnectionConfig(
        app, port=0, log_config=None, log_level="critical", lifespan="off", **settings
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield app, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(15)
        client.connect(("127.0.0.1", port))
        yield client


def all_of(client: socket.socket) -> bytes:
    """What comes until the connection is closed."""
    found = b""
    with suppress(ConnectionResetError):
        while piece := client.recv(2**16):
            found += piece
    return found


def answers(port: int) -> bool:
    with connected(port) as client:
        client.sendall(HEAD + b"Connection: close\r\n\r\n")
        return all_of(client).endswith(b"all\r\n0\r\n\r\n")


@pytest.mark.parametrize("sent", [b"", b"GET / HT", HEAD], ids=["nothing", "a word", "half a head"])
def test_a_head_that_does_not_come(sent: bytes):
    with running(head_s=0.4) as (app, port), connected(port) as client:
        client.sendall(sent)
        start = time.monotonic()
        assert all_of(client) == b""
        assert time.monotonic() - start < 10
        assert app.num_asked == 0
        assert answers(port)


def test_a_head_that_drips():
    """Each byte comes in time, the whole does not."""
    with running(head_s=0.5) as (app, port), connected(port) as client:
        start = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - start < 10:
                client.sendall(b"G")
                time.sleep(0.05)
        assert time.monotonic() - start < 8
        assert app.num_asked == 0


def test_a_body_that_does_not_come():
    with running(body_s=0.4) as (app, port), connected(port) as client:
        client.sendall(HEAD.replace(b"GET", b"POST") + b"Content-Length: 9\r\n\r\nabc")
        assert all_of(client) == b""
        assert app.num_asked == 1
        assert answers(port)


def test_a_client_that_thinks_between_its_requests_is_left_alone():
    with running(head_s=0.4, body_s=0.4) as (_, port), connected(port) as client:
        for _ in range(3):
            client.sendall(HEAD + b"\r\n")
            found = b""
            while not found.endswith(b"0\r\n\r\n"):
                found += client.recv(2**16)
            time.sleep(0.8)  # longer than a head may take, shorter than a connection is kept


def test_a_client_that_reads_nothing_is_let_go_and_others_are_answered():
    with running(unread_s=0.5) as (app, port), connected(port) as client:
        client.sendall(HEAD.replace(b"/ ", b"/many ", 1) + b"\r\n")
        assert answers(port)
        assert app.ended.wait(15)
        assert app.num_sent < NUM_CHUNKS
        assert answers(port)


def test_a_client_that_reads_slowly_gets_everything():
    with running() as (app, port), connected(port) as client:
        client.sendall(HEAD.replace(b"/ ", b"/many ", 1) + b"Connection: close\r\n\r\n")
        time.sleep(0.5)
        assert app.num_sent < NUM_CHUNKS, "it waits for the client"
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        assert len(all_of(client)) > NUM_CHUNKS * len(CHUNK)


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nbad\x01: b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
    ],
)
def test_what_is_no_http_is_answered_in_our_form(sent: bytes):
    with running() as (app, port), connected(port) as client:
        client.sendall(sent)
        head, _, body = all_of(client).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 4")
        if head.startswith(b"HTTP/1.1 400"):
            assert json.loads(body)["error"]["code"] == "invalid_http"
        assert app.num_asked == 0
        assert answers(port)
