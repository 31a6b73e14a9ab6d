"""What every request passes first: it gets a number, shows its key, and leaves a line in the log.

All of it happens before the body is read, so that a stranger costs nothing.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cascadevl.serving.http_errors import CLIENT_GONE, Refusal
from cascadevl.serving.keys import Keys
from cascadevl.serving.rates import Rates

OPEN_PATHS = frozenset(("/health", "/ready"))
"""Whoever starts and stops servers asks these, and has no key."""

_LOG = logging.getLogger(__name__)
_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAX_PATH = 200


@dataclass(slots=True, eq=False)
class _Visit:
    """A request between its head and its last byte.

    Attributes:
        request_id: Its number, the client's own if that is harmless.
        receive: Where its body comes from.
        send: Where the answer goes.
        facts: What the log says of it; others may add to that.
        is_whole: Whether all of the answer was sent.
    """

    request_id: str
    receive: Receive
    send: Send
    facts: dict[str, Any] = field(default_factory=dict)
    num_received: int = 0
    num_sent: int = 0
    status: int | None = None
    is_whole: bool = False

    async def take(self) -> Message:
        """A piece of the request."""
        message = await self.receive()
        self.num_received += len(message.get("body", b""))
        return message

    async def give(self, message: Message) -> None:
        """A piece of the answer, whose head says the request's number."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.request_id
        elif message["type"] == "http.response.body":
            self.num_sent += len(message.get("body", b""))
        await self.send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.is_whole = True


class Entrance:
    """The application behind a door."""

    def __init__(self, app: ASGIApp, keys: Keys | None = None, rates: Rates | None = None) -> None:
        """Stand before an application.

        Args:
            app: The application.
            keys: Which of them open the door; None if it is open to everybody.
            rates: How often each of them opens it for a question; None for any number of times.
        """
        self._app, self._keys, self._rates = app, keys, rates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it."""
        assert scope["type"] == "http", "there are neither lifespans nor web sockets here"
        start = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        known = given if _GIVEN_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        visit = _Visit(known, receive, send)
        scope.setdefault("state", {})["facts"] = visit.facts
        try:
            await self._enter(scope, headers, visit)
        finally:
            _LOG.info("request", extra={"facts": _line(scope, visit, time.monotonic() - start)})

    async def _enter(self, scope: Scope, headers: Headers, visit: _Visit) -> None:
        app = self._app
        if self._keys is not None and scope["path"] not in OPEN_PATHS:
            owner = self._keys.owner(headers.get("authorization", ""))
            visit.facts["key"] = owner
            if owner is None:
                app = _STRANGER.response()
            elif (refusal := self._too_often(owner, scope["method"])) is not None:
                app = refusal.response()
        await app(scope, visit.take, visit.give)

    def _too_often(self, owner: str, method: str) -> Refusal | None:
        """A refusal for whoever has asked as often as it may; to look is not to ask."""
        if self._rates is None or method != "POST":
            return None
        wait_s = math.ceil(self._rates.wait_s(owner))
        if wait_s == 0:
            return None
        return Refusal(
            429,
            f"{self._rates.per_minute} requests came with this key within a minute, which is its "
            f"limit; ask again in {wait_s} s",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(wait_s)},
        )


_STRANGER = Refusal(
    401,
    "no valid API key; send one as Authorization: Bearer KEY",
    code="invalid_api_key",
    headers={"WWW-Authenticate": "Bearer"},
)


def _line(scope: Scope, visit: _Visit, seconds: float) -> dict[str, Any]:
    """What the log says of a request: nothing of what it holds, and nothing of its answer."""
    client = scope.get("client")
    return {
        "request_id": visit.request_id,
        "client": client[0] if client else None,
        "method": scope["method"],
        "path": scope["path"][:_MAX_PATH],
        "status": visit.status if visit.is_whole else CLIENT_GONE,
        "seconds": round(seconds, 4),
        "bytes_in": visit.num_received,
        "bytes_out": visit.num_sent,
        **visit.facts,
    }
