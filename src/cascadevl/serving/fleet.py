"""The servers that have joined a front: who is there, and who gets the next request."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from cascadevl.engine.requests import EngineStats
from cascadevl.serving.wire import Hello, Role

NOTHING = EngineStats(**dict.fromkeys(EngineStats.__dataclass_fields__, 0))
"""The numbers of a server that has done nothing."""

_SLACK_TILES = 16
"""A picture goes to the server that knows it, unless that has so much more to do."""


@dataclass(slots=True, eq=False)
class Server:
    """A server that has joined.

    Attributes:
        id: Its name on the wire.
        hello: What it is.
        seen: When it was heard of last.
        stats: What it has done.
        load: Tiles to be encoded, or answers to be given.
    """

    id: bytes
    hello: Hello
    seen: float = field(default_factory=time.monotonic)
    stats: EngineStats = NOTHING
    load: int = 0


class Fleet:
    """All servers of a front."""

    def __init__(self) -> None:
        """Begin with none."""
        self._servers: dict[bytes, Server] = {}
        self._left = [NOTHING]  # what those have done that are gone

    def join(self, id_: bytes, hello: Hello) -> Server:
        """Take up a server."""
        server = self._servers[id_] = Server(id_, hello)
        return server

    def leave(self, server: Server) -> None:
        """Forget a server, but not what it has done."""
        del self._servers[server.id]
        self._left = [_sum([*self._left, _done(server.stats)])]

    def find(self, id_: bytes) -> Server | None:
        """The server of a name, if it has joined."""
        return self._servers.get(id_)

    def of(self, role: Role) -> list[Server]:
        """All servers of one half."""
        return [server for server in self._servers.values() if server.hello.role == role]

    def silent(self, seconds: float) -> list[Server]:
        """Servers that have said nothing for so long."""
        latest = time.monotonic() - seconds
        return [server for server in self._servers.values() if server.seen < latest]

    @property
    def missing(self) -> str | None:
        """Which half has no server, in words."""
        roles: tuple[Role, ...] = ("vision", "language")
        missing = [role for role in roles if not self.of(role)]
        return f"no {' and no '.join(missing)} server is there" if missing else None

    def stats(self) -> EngineStats:
        """What all hold, and all have done that ever joined."""
        return _sum([*self._left, *(server.stats for server in self._servers.values())])

    def language(self) -> Server | None:
        """The language server that has the least to do."""
        return min(self.of("language"), key=lambda server: server.load, default=None)

    def vision(self, key: bytes) -> Server | None:
        """The vision server for a picture: the same one for the same picture, which it may know.

        Args:
            key: Of the picture.
        """
        servers = self.of("vision")
        least = min((server.load for server in servers), default=0)
        free = [server for server in servers if server.load <= least + _SLACK_TILES]

        def rank(server: Server) -> bytes:
            return hashlib.blake2b(server.id + key, digest_size=8).digest()

        return max(free, key=rank, default=None)


def _sum(stats: Iterable[EngineStats]) -> EngineStats:
    each = list(stats)
    names = EngineStats.__dataclass_fields__
    return EngineStats(**{name: sum(getattr(one, name) for one in each) for name in names})


def _done(stats: EngineStats) -> EngineStats:
    """What remains true of a server that is gone: what it has done, not what it held."""
    held = ("waiting", "running", "pages", "free_pages")
    names = EngineStats.__dataclass_fields__
    return EngineStats(**{name: 0 if name in held else getattr(stats, name) for name in names})
