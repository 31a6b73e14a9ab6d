"""Pictures by their addresses, for a server that was told from where it may take them.

Off unless hosts are named. An address in a request makes a server ask on behalf of a stranger, from
within its own network. So a host must be on the list, all its addresses must be public, the
connection goes to the very address that was checked (a second look-up could say something else),
and each redirect is checked anew. Size and time are bounded as a whole, not by step.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import quote, urljoin, urlsplit

import h11

from cascadevl.errors import ConfigError, RequestError

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_SAFE = "/%:@!$&'()*+,;=~-._?"
_MAX_HEAD_BYTES = 2**14


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteConfig:
    """From where pictures are fetched, and how much of them.

    Attributes:
        hosts: Names, with a port where it is not the usual one; ``*.example.org`` stands for all
            below it, ``*`` for every public host.
        networks: Networks that are not public and allowed all the same.
        max_bytes: Of one picture or video.
        timeout_s: For all of it: names, redirects and the content.
        max_redirects: Most redirects of one.
        num_at_once: Most that are fetched at a time; others wait.
    """

    hosts: tuple[str, ...]
    networks: tuple[Network, ...] = ()
    max_bytes: int = 2**24
    timeout_s: float = 10.0
    max_redirects: int = 3
    num_at_once: int = 16

    def __post_init__(self) -> None:
        """Refuse names of hosts that can match nothing.

        Raises:
            ConfigError: If one is an address with a scheme or path, or none is named.
        """
        if not self.hosts:
            raise ConfigError("no host is named from which pictures are fetched; name one, or *")
        for host in self.hosts:
            if "/" in host or not host or "*" in host.removeprefix("*"):
                raise ConfigError(
                    f"{host!r} is no host; write example.org, example.org:8080, *.example.org or *"
                )


Resolve: TypeAlias = Callable[[str, int], Sequence[str]]
"""Finds the addresses of a host; it may take its time."""


def addresses_of(host: str, port: int) -> Sequence[str]:
    """The addresses of a host, as the system knows them.

    Args:
        host: Its name.
        port: The port that is asked for.

    Raises:
        OSError: If it has none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(each[4][0]).partition("%")[0] for each in found]


@dataclass(slots=True)
class Room:
    """Bytes that the pictures of one request may still bring together.

    Attributes:
        num_bytes: So many.
        hold: Told of those that have come.
    """

    num_bytes: int
    hold: Callable[[int], None]

    def take(self, number: int) -> None:
        """Use some of it.

        Raises:
            RequestError: If there is not so much left.
        """
        self.num_bytes -= number
        if self.num_bytes < 0:
            raise RequestError("the pictures behind the addresses are too large together")
        self.hold(number)


@dataclass(frozen=True, slots=True)
class _Target:
    """An address that may be asked, its host not looked up yet."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def origin(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


class Fetcher:
    """Fetches what stands behind addresses that strangers name."""

    def __init__(self, config: RemoteConfig, resolve: Resolve = addresses_of) -> None:
        """Know what is allowed.

        Args:
            config: From where, and how much.
            resolve: Finds addresses; called in a thread.
        """
        self._config, self._resolve = config, resolve
        self._resolving = ThreadPoolExecutor(4, thread_name_prefix="resolve")
        self._turns = asyncio.Semaphore(config.num_at_once)
        self._tls = ssl.create_default_context()

    async def fetch(self, url: str, room: Room) -> bytes:
        """The content behind an address.

        Args:
            url: The address.
            room: Of the request that names it.

        Raises:
            RequestError: If it may not be asked, or does not give what is wanted in time.
        """
        config = self._config
        try:
            async with asyncio.timeout(config.timeout_s), self._turns:
                for _ in range(config.max_redirects + 1):
                    target = self._target(url)
                    found = await self._get(target, await self._checked_address(target), room)
                    if isinstance(found, bytes):
                        return found
                    if target.scheme == "https" and urlsplit(found).scheme == "http":
                        raise RequestError(f"{target.host} redirects from https to http")
                    url = urljoin(url, found)
        except TimeoutError:
            raise RequestError(
                f"a picture did not come within {config.timeout_s:g} s; send it as a data URL"
            ) from None
        raise RequestError(f"a picture is redirected more than {config.max_redirects} times")

    def _target(self, url: str) -> _Target:
        """Take an address apart, and hold it against the list of hosts."""
        try:
            parts = urlsplit(url)
            host = (parts.hostname or "").rstrip(".").encode("idna").decode().lower()
            port = parts.port or _PORTS.get(parts.scheme, 0)
        except ValueError as error:
            raise RequestError(f"{url[:60]!r} is no address ({error})") from error
        if parts.scheme not in _PORTS or not host or "@" in parts.netloc:
            raise RequestError(
                f"{url[:60]!r} is not fetched; give http://host/path or https://host/path, "
                f"without a user, or a data URL"
            )
        if not any(_matches(pattern, host, port, parts.scheme) for pattern in self._config.hosts):
            raise RequestError(
                f"this server does not fetch from {host}:{port}; send the picture as a data URL"
            )
        path = quote(parts.path or "/", safe=_SAFE)
        if parts.query:
            path += "?" + quote(parts.query, safe=_SAFE)
        return _Target(parts.scheme, host, port, path)

    async def _checked_address(self, target: _Target) -> str:
        """An address of a host; all it has must be public, or on the list of networks."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(
                self._resolving, self._resolve, target.host, target.port
            )
        except (OSError, UnicodeError) as error:
            raise RequestError(f"{target.host} is not known here; is it spelt right?") from error
        for address in found:
            if not self._may_ask(ipaddress.ip_address(address)):
                raise RequestError(f"{target.host} is in a network that is not asked from here")
        if not found:
            raise RequestError(f"{target.host} has no address")
        return found[0]

    def _may_ask(self, address: Address) -> bool:
        if any(address in network for network in self._config.networks):
            return True
        hidden = _within(address)
        is_public = address.is_global and not address.is_multicast
        return is_public and (hidden is None or self._may_ask(hidden))

    async def _get(self, target: _Target, address: str, room: Room) -> bytes | str:
        """What stands at an address, or where it is redirected to."""
        tls = self._tls if target.scheme == "https" else None
        name = target.host if tls else None
        try:
            reader, writer = await asyncio.open_connection(
                address, target.port, ssl=tls, server_hostname=name
            )
        except (OSError, ssl.SSLError) as error:
            raise RequestError(f"{target.host}:{target.port} cannot be reached") from error
        try:
            return await _Exchange(target, self._config.max_bytes, room).run(reader, writer)
        except h11.ProtocolError as error:
            raise RequestError(f"{target.host} does not speak HTTP ({error})") from error
        except OSError as error:
            raise RequestError(f"the connection to {target.host} broke") from error
        finally:
            writer.transport.abort()


@dataclass(slots=True)
class _Exchange:
    """One request and its answer."""

    target: _Target
    max_bytes: int
    room: Room

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes | str:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
        headers = {
            "Host": self.target.origin,
            "User-Agent": "cascadevl",
            "Accept": "image/*, video/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        request = h11.Request(method="GET", target=self.target.path, headers=list(headers.items()))
        for each in (request, h11.EndOfMessage()):
            writer.write(connection.send(each) or b"")
        content = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(2**16))
            elif isinstance(event, h11.Response):
                location = self._head(event)
                if location is not None:
                    return location
            elif isinstance(event, h11.Data):
                content += event.data
                self.room.take(len(event.data))
                self._check_size(len(content))
            elif isinstance(event, h11.EndOfMessage):
                return bytes(content)

    def _head(self, response: h11.Response) -> str | None:
        """Check the head of an answer; gives where it redirects to, if it does."""
        headers = {name: value.decode("latin-1") for name, value in response.headers}
        host, status = self.target.host, response.status_code
        if status in _REDIRECTS and b"location" in headers:
            return headers[b"location"]
        if status != 200:
            raise RequestError(f"{host} answers with status {status} instead of a picture")
        if headers.get(b"content-encoding", "identity") != "identity":
            raise RequestError(f"{host} sends the picture compressed once more; that is not read")
        self._check_size(int(headers.get(b"content-length", "0")))
        return None

    def _check_size(self, number: int) -> None:
        if number > self.max_bytes:
            raise RequestError(
                f"a picture at {self.target.host} is larger than {self.max_bytes} bytes; make it "
                f"smaller"
            )


def _matches(pattern: str, host: str, port: int, scheme: str) -> bool:
    name, colon, given = pattern.lower().rpartition(":")
    if not colon:
        name, given = pattern.lower(), str(_PORTS[scheme])
    if given != str(port):
        return False
    return name in ("*", host) or (name.startswith("*.") and host.endswith(name[1:]))


def _within(address: Address) -> Address | None:
    """The IPv4 address that an IPv6 address stands for, where routers take it for that."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None)
