"""JSON over HTTP: asked again where that may help, and a word on what to mend where it cannot.

Only the standard library is used. Redirects are errors, a proxy of the environment is for other
machines and never for this one, and a key is never shown.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from cascadevl.errors import ConfigError, RequestError

_REFUSED = (400, 413, 422)
"""The server will never answer this request: too long, too many pictures, ..."""

_PASSING = (408, 409, 425, 429)
"""Worth another try, like everything from 500 upwards."""

_MAX_DELAY_S = 60.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Refused(Exception):
    """The server will not answer this one request, however often it is asked; others it may."""


class Unanswered(RequestError):
    """The server cannot be reached or has too much to do: it may answer in a while."""


class _PassingFailure(Exception):
    """A failure that may be gone at the next try.

    ``delay_s`` is what the server asks to wait; ``is_bug`` says that it failed at this request, and
    may well do so again.
    """

    def __init__(self, problem: str, delay_s: float = 0.0, *, is_bug: bool = False) -> None:
        super().__init__(problem)
        self.delay_s, self.is_bug = delay_s, is_bug


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: a key must not go elsewhere, and a POST would become a GET."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpServer:
    """A server that takes and gives JSON.

    Attributes:
        url: Base address, for example ``http://localhost:8000/v1``.
        api_key: Sent as bearer token; never shown.
        timeout_s: Longest silence of the server.
        max_retries: How often a request is sent again after a passing failure.
        backoff_s: Pause before the second try; doubled each time, with chance added.
        remedies: What to do about a status, beside what is known of it.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 600.0
    max_retries: int = 5
    backoff_s: float = 1.0
    remedies: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: If the address is no HTTP address, or a number is out of range.
        """
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"the server's address is {self.url!r}; give it as http://host:port/v1"
            )
        if self.max_retries < 0 or self.timeout_s <= 0:
            raise ConfigError(
                f"max_retries is {self.max_retries} and timeout_s {self.timeout_s}; they must be "
                f"at least 0 and above 0"
            )

    def endpoint(self, path: str) -> str:
        """The address of what the server does under a path."""
        return f"{self.url.rstrip('/')}/{path}"

    def get(self, path: str) -> bytes:
        """What stands under a path.

        Raises:
            Refused: If the server will not give it.
            RequestError: If the server cannot be reached, or does not do what is asked.
        """
        return self._persist(path, None, 0, None)

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        seed: int = 0,
        stop: threading.Event | None = None,
    ) -> bytes:
        """Send JSON and give the answer.

        Args:
            path: What is asked to do it.
            body: The request.
            seed: Of the pauses between tries.
            stop: No other try is made once this is set.

        Raises:
            Refused: If the server will not answer this request.
            RequestError: If the server cannot be reached, or does not do what is asked.
        """
        return self._persist(path, json.dumps(body).encode(), seed, stop)

    @contextmanager
    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Events]:
        """Send JSON and give the data of the server-sent events as they come; asked once.

        Leaving the context closes the connection, by which servers know that nobody waits.

        Args:
            path: What is asked to do it.
            body: The request.

        Raises:
            Refused: If the server will not answer this request.
            Unanswered: If the server cannot be reached, breaks off, or has too much to do.
            RequestError: If it fails, or does not do what is asked.
        """
        try:
            with self._opened(path, json.dumps(body).encode()) as response:
                yield Events(response)
        except _PassingFailure as failure:
            kind = RequestError if failure.is_bug else Unanswered
            raise kind(f"{self.endpoint(path)}: {failure}; is the server up?") from failure

    def _persist(
        self, path: str, content: bytes | None, seed: int, stop: threading.Event | None
    ) -> bytes:
        chance = random.Random(seed)
        stop = threading.Event() if stop is None else stop
        for attempt in range(self.max_retries + 1):
            try:
                with self._opened(path, content) as response:
                    return response.read()
            except _PassingFailure as failure:
                if attempt == self.max_retries:
                    raise RequestError(
                        f"{self.endpoint(path)}: {failure}, {attempt + 1} times in a row; is the "
                        "server up? fewer requests at a time or a longer timeout may help"
                    ) from failure
                pause = self.backoff_s * 2**attempt * chance.uniform(0.5, 1.0)
                if stop.wait(min(_MAX_DELAY_S, max(pause, failure.delay_s))):
                    break
        raise RequestError("another request failed")  # nobody sees this one

    @contextmanager
    def _opened(self, path: str, content: bytes | None) -> Iterator[http.client.HTTPResponse]:
        """The response to one try; failures while it is read count as well."""
        headers = {"Accept": "application/json"}
        if content is not None:
            headers["Content-Type"] = "application/json"
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.endpoint(path), content, headers)
        is_here = urlsplit(self.url).hostname in _LOOPBACK
        proxies = [urllib.request.ProxyHandler({})] if is_here else []
        opener = urllib.request.build_opener(_NoRedirect, *proxies)
        try:
            with opener.open(request, timeout=self.timeout_s) as response:
                yield response
        except urllib.error.HTTPError as error:
            raise self._refusal(error, path) from error
        except TimeoutError as error:
            raise _PassingFailure(f"no answer for {self.timeout_s:g} s") from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _PassingFailure(f"no connection within {self.timeout_s:g} s") from error
            raise _PassingFailure(f"cannot be reached ({error.reason})") from error
        except (OSError, http.client.HTTPException) as error:
            raise _PassingFailure(f"the connection broke ({error!r})") from error

    def _refusal(
        self, error: urllib.error.HTTPError, path: str
    ) -> Refused | _PassingFailure | RequestError:
        """What an error status means."""
        with error:
            said = error.read(2000).decode("utf-8", "replace").strip()[:300]
        status = f"status {error.code} ({said or error.reason})"
        if error.code in _REFUSED:
            return Refused(status)
        if error.code in _PASSING or error.code >= 500:
            wish = error.headers.get("Retry-After", "")
            delay_s = float(wish) if wish.isdecimal() else 0.0
            return _PassingFailure(status, delay_s, is_bug=error.code == 500)
        known = {401: "give a valid API key", 403: "this API key may not do that", **self.remedies}
        remedy = known.get(error.code, "check the address")
        return RequestError(f"{self.endpoint(path)}: {status}; {remedy}")


class Events(Iterator[str]):
    """The data of server-sent events, up to ``[DONE]``.

    Attributes:
        headers: Of the response, their names in small letters.
    """

    def __init__(self, response: http.client.HTTPResponse) -> None:
        """Read a response as it comes."""
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        self._data = _data(response)

    def __next__(self) -> str:
        """The next event."""
        return next(self._data)


def _data(response: http.client.HTTPResponse) -> Iterator[str]:
    for line in response:
        name, _, data = line.decode("utf-8", "replace").strip().partition(":")
        if name == "data":
            if data.strip() == "[DONE]":
                return
            yield data.strip()
