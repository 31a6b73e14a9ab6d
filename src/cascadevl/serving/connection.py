"""One connection of a client: closed where the client keeps it waiting.

uvicorn waits for ever for the rest of a request, and for ever for a client to read its answer. Some
hundred clients that do neither would leave nobody else a connection.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cascadevl.serving.http_errors import Refusal


class ConnectionConfig(uvicorn.Config):
    """Settings of the HTTP server, with the patience it has with clients.

    Attributes:
        head_s: Longest time for the head of a request, and without any.
        body_s: Longest time from there to the end of its body.
        unread_s: Longest time in which a client reads nothing of what waits for it.
    """

    def __init__(
        self, app: Any, *, head_s: float, body_s: float, unread_s: float, **settings: Any
    ) -> None:
        """Add our own settings to uvicorn's.

        Args:
            app: The application.
            head_s: See above.
            body_s: See above.
            unread_s: See above.
            **settings: Of uvicorn.
        """
        super().__init__(app, http=Connection, ws="none", **settings)
        self.head_s, self.body_s, self.unread_s = head_s, body_s, unread_s


class Connection(H11Protocol):
    """A connection that does not wait for ever, and words its errors as OpenAI does."""

    def __init__(self, config: uvicorn.Config, *args: Any, **more: Any) -> None:
        """Begin without a request.

        Args:
            config: A `ConnectionConfig`.
            *args: Of uvicorn's class.
            **more: Of uvicorn's class.
        """
        assert isinstance(config, ConnectionConfig)
        super().__init__(config, *args, **more)
        self._patience_s = {h11.IDLE: config.head_s, h11.SEND_BODY: config.body_s}
        self._unread_s = config.unread_s
        self._awaited: Any = None  # the state of the client for which the clock runs
        self._receiving: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        super().connection_lost(exc)
        for timer in (self._receiving, self._unread):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Take a piece of a request."""
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        """Let the clock run while a request is not whole."""
        state = self.conn.their_state
        if state is self._awaited:
            return
        if self._receiving is not None:
            self._receiving.cancel()
        patience_s = self._patience_s.get(state)
        abort = self.transport.abort
        self._receiving = None if patience_s is None else self.loop.call_later(patience_s, abort)
        self._awaited = state

    def pause_writing(self) -> None:
        """Note that the client reads more slowly than we write."""
        super().pause_writing()
        self._unread = self.loop.call_later(self._unread_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Note that it has read."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, and close the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # an answer has begun, or ended: there is no place for another
            return
        body = Refusal(400, f"{msg} Send HTTP/1.1.", code="invalid_http").body()
        headers = [("content-type", "application/json"), ("connection", "close")]
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
