"""A real HTTP server on a loopback port that answers chat completions as a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass
class Answered:
    """What the server says to one request.

    Attributes:
        content: JSON, or raw bytes.
        status: HTTP status.
        headers: More headers.
        hold: Wait for this event before answering.
        hang_up: Close the connection without a word.
    """

    content: object = field(default_factory=dict)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    hold: threading.Event | None = None
    hang_up: bool = False


def said(text: str | None, finish: str = "stop", **more: object) -> Answered:
    """A completion of OpenAI's form."""
    message = {"role": "assistant", "content": text, **more}
    return Answered({"choices": [{"index": 0, "message": message, "finish_reason": finish}]})


@dataclass
class ChatServer:
    """The running server.

    Attributes:
        url: Its base address.
        bodies: Every request's JSON, as they came.
        headers: Every request's headers.
        most_at_once: Most requests that were being answered at a time.
    """

    url: str
    bodies: list[Body] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0


@contextmanager
def chat_server(
    answer: Callable[[Body], Answered], models: Sequence[Body] = ()
) -> Iterator[ChatServer]:
    """Run a server while the context lasts.

    Args:
        answer: Gives the answer to a request's JSON; called in several threads.
        models: The models it lists, as vLLM describes them.
    """
    lock, running = threading.Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal running
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                running += 1
                server.most_at_once = max(server.most_at_once, running)
                server.bodies.append(body)
                server.headers.append({**self.headers, "path": self.path})
            try:
                self._reply(answer(body))
            finally:
                with lock:
                    running -= 1

        def do_GET(self) -> None:
            listed = {"object": "list", "data": list(models)}
            self._reply(Answered(listed) if self.path == "/v1/models" else Answered(status=404))

        def _reply(self, answered: Answered) -> None:
            if answered.hold is not None:
                answered.hold.wait(20)
            if answered.hang_up:
                return
            is_raw = isinstance(answered.content, bytes)
            content = answered.content if is_raw else json.dumps(answered.content).encode()
            assert isinstance(content, bytes)
            try:
                self.send_response(answered.status)
                for name, value in answered.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except BrokenPipeError:  # the client no longer waits
                pass

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        server = ChatServer(url=f"http://127.0.0.1:{httpd.server_port}/v1")
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            httpd.shutdown()
            thread.join()
