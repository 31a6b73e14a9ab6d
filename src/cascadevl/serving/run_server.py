"""The HTTP server around the API: it listens, and stops without losing what it has in hand."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import uvicorn

from cascadevl.errors import ConfigError
from cascadevl.serving.api import Api
from cascadevl.serving.connection import ConnectionConfig
from cascadevl.serving.entrance import Entrance
from cascadevl.serving.keys import Keys
from cascadevl.serving.openai_server import make_app
from cascadevl.serving.rates import Rates


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenConfig:
    """Where a server listens, to whom, and how long it waits.

    Attributes:
        host: Address to listen at.
        port: Port to listen at; 0 for any that is free.
        keys: Whose requests are answered; None for everybody's.
        per_minute: Requests with each of the keys in any minute; None for any number.
        drain_s: Longest time for what is in hand when the server is told to stop.
        head_s: Longest time for the head of a request.
        body_s: Longest time for its body.
        unread_s: Longest time in which a client reads nothing of its answer.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Keys | None = None
    per_minute: int | None = None
    drain_s: int = 60
    head_s: float = 20.0
    body_s: float = 120.0
    unread_s: float = 60.0


class ApiServer(uvicorn.Server):
    """Takes nothing new once it is told to stop, and ends what it has in hand.

    Attributes:
        on_ready: Called with its address once it listens.
    """

    def __init__(self, api: Api, config: ListenConfig) -> None:
        """Bind the API to an address.

        Args:
            api: Answers.
            config: Where and to whom.
        """
        self._api = api
        self.on_ready: Callable[[str], None] = lambda address: None
        rates = None if config.per_minute is None else Rates(config.per_minute)
        super().__init__(
            ConnectionConfig(
                Entrance(make_app(api), config.keys, rates),
                host=config.host,
                port=config.port,
                head_s=config.head_s,
                body_s=config.body_s,
                unread_s=config.unread_s,
                timeout_graceful_shutdown=config.drain_s,
                access_log=False,
                log_config=None,
                log_level="warning",
                lifespan="off",
                server_header=False,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, and to listen."""
        await self._api.answers.start()
        try:
            await super().startup(sockets)
        except SystemExit:  # uvicorn's word for an address that it cannot have
            await self._api.answers.stop()
            raise
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        self.on_ready(f"http://{name}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what is in hand, then stop answering."""
        await super().shutdown(sockets)
        await self._api.answers.stop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop, at a signal."""
        self._api.is_draining = True
        super().handle_exit(sig, frame)


def serve(server: ApiServer, on_ready: Callable[[str], None]) -> None:
    """Run a server until it is told to stop: by SIGTERM, or by Ctrl-C.

    Args:
        server: The server.
        on_ready: Told its address once it listens.

    Raises:
        ConfigError: If it cannot listen at its address.
        KeyboardInterrupt: After Ctrl-C.
    """
    # uvicorn raises the signal again once it has stopped; having stopped well is no failure.
    server.on_ready = on_ready
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run()
    except SystemExit as error:
        config = server.config
        raise ConfigError(f"cannot listen at {config.host}:{config.port}; is it in use?") from error
    finally:
        signal.signal(signal.SIGTERM, before)
