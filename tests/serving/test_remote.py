"""Pictures by their addresses: what may be asked, and every way around that."""

from __future__ import annotations

import asyncio
import ipaddress
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cascadevl.errors import ConfigError, RequestError
from cascadevl.serving.remote import Fetcher, RemoteConfig, Room

PUBLIC, PRIVATE = "127.0.0.2", "127.0.0.3"
"""Two addresses of this machine: one that stands for the public network, and one for our own."""

STORE = ipaddress.ip_network(f"{PUBLIC}/32")
PICTURE = b"\x89PNG and so on"


@dataclass
class Web:
    """Servers at both addresses.

    Attributes:
        port: Of both.
        seen: Addresses, host headers and paths that were asked.
        answers: What stands where.
    """

    port: int
    answers: dict[str, Callable[[BaseHTTPRequestHandler], None]]
    seen: list[tuple[str, str, str]] = field(default_factory=list)

    def url(self, host: str, path: str = "/picture") -> str:
        return f"http://{host}:{self.port}{path}"


def sends(content: bytes, status: int = 200, **headers: str) -> Callable[..., None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        named = {"Content-Length": str(len(content)), **headers}
        for name, value in named.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def redirects(url: str, status: int = 302) -> Callable[..., None]:
    return sends(b"", status, Location=url)


@contextmanager
def web() -> Iterator[Web]:
    found = Web(0, {"/picture": sends(PICTURE)})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.seen.append((self.connection.getsockname()[0], self.headers["Host"], self.path))
            found.answers[self.path](self)

        def log_message(self, *_: object) -> None:
            pass

    public = ThreadingHTTPServer((PUBLIC, 0), Handler)
    found.port = public.server_port
    private = ThreadingHTTPServer((PRIVATE, found.port), Handler)
    threads = [threading.Thread(target=each.serve_forever) for each in (public, private)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        for server in (public, private):
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()


def names(**hosts: Sequence[str]) -> Callable[[str, int], Sequence[str]]:
    """Look-ups of names; one without an entry must not happen."""
    return lambda host, port: hosts[host.replace(".", "_")]


def fetch(
    url: str,
    resolve: Callable[[str, int], Sequence[str]],
    port: int = 80,
    num_bytes: int = 2**20,
    **config: object,
) -> bytes:
    settings = {"hosts": (f"store.test:{port}",), "networks": (STORE,), "timeout_s": 5.0, **config}

    async def ask() -> bytes:
        fetcher = Fetcher(RemoteConfig(**settings), resolve)
        return await fetcher.fetch(url, Room(num_bytes, lambda number: None))

    return asyncio.run(ask())


def test_a_picture_comes_from_a_host_on_the_list():
    with web() as found:
        resolve = names(store_test=[PUBLIC])
        assert fetch(found.url("store.test"), resolve, found.port) == PICTURE
        assert found.seen == [(PUBLIC, f"store.test:{found.port}", "/picture")]


@pytest.mark.parametrize(
    "url",
    [
        "http://other.test:{port}/picture",
        "http://store.test.other.test:{port}/picture",
        "http://store.test/picture",  # another port
        "http://store.test:{other}/picture",
        "http://127.0.0.3:{port}/picture",
        "http://[::1]:{port}/picture",
        "http://2130706435:{port}/picture",
        "http://ann:secret@store.test:{port}/picture",
        "http://store.test:{port}@127.0.0.3/picture",
        "http:///picture",
        "ftp://store.test:{port}/picture",
        "file:///etc/passwd",
        "gopher://store.test:{port}/_GET",
        "http://store.test:99999/",
        "http://[store.test/",
        "http://\udcff/",
    ],
)
def test_other_addresses_are_not_even_looked_up(url: str):
    asked: list[str] = []

    def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return [PUBLIC]

    with pytest.raises(RequestError):
        fetch(url.format(port=8123, other=8124), resolve, 8123)
    assert asked == []


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.3.4", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255", "192.0.2.1"),
        *("::1", "::", "fe80::1", "fc00::1", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1"),
        *("2002:7f00:1::", "2002:a00:1::", "2001:0:7f00:1::f5ff:fffe"),
    ],
)
@pytest.mark.parametrize("beside", [[], ["8.8.8.8"]], ids=["alone", "beside a public one"])
def test_hosts_in_other_networks_are_not_asked(address: str, beside: list[str]):
    with pytest.raises(RequestError, match="not asked from here"):
        fetch("http://any.test/", lambda *_: [*beside, address], hosts=("*",))


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "64:ff9b::808:808"])
def test_public_addresses_may_be_asked(address: str):
    fetcher = Fetcher(RemoteConfig(hosts=("*",)))
    assert fetcher._may_ask(ipaddress.ip_address(address))


def test_each_redirect_is_checked_anew():
    hosts = names(store_test=[PUBLIC], inner_test=[PRIVATE])
    with web() as found:
        config = {"hosts": (f"*.test:{found.port}",)}
        found.answers["/near"] = redirects("/picture")
        assert fetch(found.url("store.test", "/near"), hosts, found.port) == PICTURE
        for target in (
            found.url("inner.test"),
            found.url(PRIVATE),
            f"//inner.test:{found.port}/picture",
            "http://169.254.169.254/latest/meta-data",
            "file:///etc/passwd",
        ):
            found.answers["/away"] = redirects(target, 307)
            with pytest.raises(RequestError):
                fetch(found.url("store.test", "/away"), hosts, found.port, **config)
        assert all(address == PUBLIC for address, _, _ in found.seen)


def test_a_name_is_looked_up_once_and_the_address_that_was_checked_is_asked():
    """DNS rebinding: the second look-up would lead into our own network."""
    lookups = [[PUBLIC], [PRIVATE], [PRIVATE]]
    with web() as found:
        resolve = lambda *_: lookups.pop(0)  # noqa: E731
        assert fetch(found.url("store.test"), resolve, found.port) == PICTURE
        assert len(lookups) == 2
        assert [address for address, _, _ in found.seen] == [PUBLIC]


def test_redirects_in_a_circle_end():
    with web() as found:
        found.answers["/circle"] = redirects("/circle")
        with pytest.raises(RequestError, match="more than 3 times"):
            fetch(found.url("store.test", "/circle"), names(store_test=[PUBLIC]), found.port)
        assert len(found.seen) == 4


def chunked_without_end(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"1000\r\n" + bytes(4096) + b"\r\n")
    except OSError:
        handler.close_connection = True


def lies_about_its_length(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(2**40))
    handler.end_headers()


@pytest.mark.parametrize("answer", [chunked_without_end, lies_about_its_length])
def test_what_is_too_large_is_not_read_to_its_end(answer: Callable[..., None]):
    with web() as found:
        found.answers["/large"] = answer
        with pytest.raises(RequestError, match="larger than 100000 bytes"):
            fetch(
                found.url("store.test", "/large"),
                names(store_test=[PUBLIC]),
                found.port,
                max_bytes=100_000,
            )


def test_all_pictures_of_a_request_share_its_room():
    with web() as found, pytest.raises(RequestError, match="too large together"):
        fetch(found.url("store.test"), names(store_test=[PUBLIC]), found.port, num_bytes=5)


def drips(head: bool) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: ")
        if not head:
            handler.wfile.write(b"a\r\nContent-Length: 1000\r\n\r\n")
        try:
            for _ in range(100):
                handler.wfile.write(b"a")
                time.sleep(0.05)
        except OSError:
            handler.close_connection = True

    return answer


@pytest.mark.parametrize("head", [True, False], ids=["head", "body"])
def test_a_server_that_drips_is_given_up_in_time(head: bool):
    with web() as found:
        found.answers["/drip"] = drips(head)
        start = time.monotonic()
        with pytest.raises(RequestError, match=r"within 0\.5 s"):
            fetch(
                found.url("store.test", "/drip"),
                names(store_test=[PUBLIC]),
                found.port,
                timeout_s=0.5,
            )
        assert time.monotonic() - start < 4


def test_a_look_up_that_takes_for_ever_is_given_up_in_time():
    release = threading.Event()

    def resolve(*_: object) -> Sequence[str]:
        release.wait(20)
        return [PUBLIC]

    def give_up() -> None:
        with pytest.raises(RequestError, match="within"):
            fetch("http://store.test/", resolve, timeout_s=0.3)
        release.set()

    give_up()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (sends(b"", 404), "status 404"),
        (sends(b"", 206), "status 206"),
        (sends(b"abc", Content_Encoding="gzip"), "compressed"),
        (lambda handler: handler.wfile.write(b"SSH-2.0-x\r\n\r\n"), "does not speak HTTP"),
        (lambda handler: None, "does not speak HTTP"),
        (lambda handler: handler.wfile.write(b"HTTP/1.1 200\r\nA: " + b"a" * 10**5), "HTTP"),
        (lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\nabc"), None),
    ],
)
def test_other_answers(answer: Callable[..., None], message: str | None):
    with web() as found:
        found.answers["/other"] = answer
        url, resolve = found.url("store.test", "/other"), names(store_test=[PUBLIC])
        if message is None:
            assert fetch(url, resolve, found.port) == b"abc"
        else:
            with pytest.raises(RequestError, match=message):
                fetch(url, resolve, found.port)


def test_a_path_cannot_smuggle_a_second_request():
    with web() as found:
        seen: list[str] = []

        class Any(dict[str, Callable[..., None]]):
            def __missing__(self, path: str) -> Callable[..., None]:
                seen.append(path)
                return sends(PICTURE)

        found.answers = Any()
        url = found.url("store.test", "/a b%20\r\nHost: evil\r\n\r\nGET /c?d=ü&e=%2F")
        assert fetch(url, names(store_test=[PUBLIC]), found.port) == PICTURE
        assert seen == ["/a%20b%20Host:%20evilGET%20/c?d=%C3%BC&e=%2F"]


def test_nobody_answers():
    with web() as found:
        pass
    with pytest.raises(RequestError, match="cannot be reached"):
        fetch(found.url("store.test"), names(store_test=[PUBLIC]), found.port)


@pytest.mark.parametrize("hosts", [(), ("http://a.test",), ("a.*.test",), ("",)])
def test_lists_of_hosts_that_make_no_sense(hosts: tuple[str, ...]):
    with pytest.raises(ConfigError, match="host"):
        RemoteConfig(hosts=hosts)
