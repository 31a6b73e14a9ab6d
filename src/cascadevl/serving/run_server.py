"""The HTTP server around the API: it listens, and stops without losing what it has in hand."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from cascadevl.errors import ConfigError
from cascadevl.serving.api import Api
from cascadevl.serving.openai_server import make_app


class ApiServer(uvicorn.Server):
    """Takes nothing new once it is told to stop, and ends what it has in hand.

    Attributes:
        on_ready: Called with its address once it listens.
    """

    def __init__(self, api: Api, *, host: str, port: int, drain_s: int = 60) -> None:
        """Bind the API to an address.

        Args:
            api: Answers.
            host: Address to listen at.
            port: Port to listen at; 0 for any that is free.
            drain_s: Longest time for what is in hand when the server is told to stop.
        """
        self._api = api
        self.on_ready: Callable[[str], None] = lambda address: None
        super().__init__(
            uvicorn.Config(
                make_app(api),
                host=host,
                port=port,
                timeout_graceful_shutdown=drain_s,
                access_log=False,
                log_level="warning",
                lifespan="off",
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
