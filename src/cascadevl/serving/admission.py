"""Which requests are taken, and what those in hand hold: how many they are, and their bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from cascadevl.engine.requests import EngineStats
from cascadevl.serving.http_errors import Refusal
from cascadevl.serving.metrics import Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    """Limits of the API. Those of a single request are `cascadevl.serving.limits.Limits`.

    Attributes:
        model_name: By which clients ask for the model.
        max_requests: Most requests in hand; more are refused for now (429).
        max_waiting: Most answers that wait for their turn; no request is taken meanwhile (429).
        max_body_bytes: Longest body of a request, pictures included.
        max_held_bytes: Most bytes of the bodies of all requests in hand; more are refused for now.
        num_preparing: Threads that read bodies and cut pictures.
        keep_alive_s: A stream that has nothing to say for so long says that it goes on.
    """

    model_name: str
    max_requests: int = 1024
    max_waiting: int = 4096
    max_body_bytes: int = 2**26
    max_held_bytes: int = 2**30
    num_preparing: int = 2
    keep_alive_s: float = 15.0  # as the HTML standard advises authors of event streams


class Admission:
    """Counts what is in hand.

    Attributes:
        num_open: Requests in hand.
        num_held_bytes: Bytes of their bodies.
    """

    def __init__(
        self, config: ApiConfig, metrics: Metrics, stats: Callable[[], EngineStats]
    ) -> None:
        """Begin with nothing in hand.

        Args:
            config: Limits.
            metrics: Where it is told what comes and ends.
            stats: Of whoever answers.
        """
        self.config, self.metrics = config, metrics
        self._stats = stats
        self.num_open = self.num_held_bytes = 0

    def take(self, request: Request, route: str, unready: Refusal | None) -> InHand:
        """Take a request.

        Args:
            request: The request, its body not read yet.
            route: Names it in the numbers.
            unready: Why none is taken, if that is so.

        Raises:
            Refusal: If there is no room for it.
        """
        reason = unready or self._full()
        if reason is not None:
            self.metrics.refused(route, reason.status)
            raise reason
        return InHand(self, request, route)

    def _full(self) -> Refusal | None:
        config = self.config
        if self.num_open >= config.max_requests:
            return later(f"{self.num_open} requests are in hand, which is the limit")
        if (waiting := self._stats().waiting) >= config.max_waiting:
            return later(f"{waiting} answers wait for their turn, which is the limit")
        return None


class InHand:
    """A request that is counted until it ends."""

    def __init__(self, admission: Admission, request: Request, route: str) -> None:
        """Count it.

        Args:
            admission: Who counts.
            request: The request.
            route: Names it in the numbers.
        """
        self._admission, self._request, self._route = admission, request, route
        self._start: float | None = time.monotonic()
        self._lap = self._start
        self._laps: dict[str, float] = {}
        self._num_bytes = 0
        admission.num_open += 1
        admission.metrics.begun()

    async def body(self) -> bytes:
        """The body, if it is JSON and not too long.

        Raises:
            Refusal: If it is not.
        """
        headers = self._request.headers
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, f"the body is {kind or 'of no type'}; send application/json")
        self._check(int(headers.get("content-length", "0")))
        content = bytearray()
        async for piece in self._request.stream():
            content += piece
            self._check(len(content))
            self.hold(len(piece))
        return bytes(content)

    def hold(self, num_bytes: int) -> None:
        """Count bytes that are held until the request ends.

        Args:
            num_bytes: More bytes.

        Raises:
            Refusal: If all requests together hold too many.
        """
        self._num_bytes += num_bytes
        self._admission.num_held_bytes += num_bytes
        if self._admission.num_held_bytes > self._admission.config.max_held_bytes:
            raise later("the pictures of all requests in hand are too large together")

    def lap(self, stage: str) -> None:
        """Note that a stage has ended, and the next one begins.

        Args:
            stage: Its name.
        """
        now = time.monotonic()
        self._laps[stage], self._lap = now - self._lap, now

    @property
    def timing(self) -> dict[str, str]:
        """The header that tells a client how long each stage took so far, in milliseconds."""
        laps = (f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in self._laps.items())
        return {"Server-Timing": ", ".join(laps)}

    def end(self, status: int) -> None:
        """Count it as ended; only the first word counts.

        Args:
            status: The HTTP status, or `cascadevl.serving.http_errors.CLIENT_GONE`.
        """
        if self._start is None:
            return
        seconds, self._start = time.monotonic() - self._start, None
        self._admission.num_open -= 1
        self._admission.num_held_bytes -= self._num_bytes
        self._admission.metrics.ended(self._route, status, seconds)
        facts: dict[str, Any] = self._request.scope["state"].get("facts", {})
        facts["status"] = status  # a stream may fail after its head was sent
        facts |= {f"{stage}_s": round(seconds, 4) for stage, seconds in self._laps.items()}

    def _check(self, num_bytes: int) -> None:
        limit = self._admission.config.max_body_bytes
        if num_bytes > limit:
            raise Refusal(
                413,
                f"the body is longer than {limit} bytes; send smaller or fewer pictures",
                code="body_too_long",
            )


def later(why: str) -> Refusal:
    """A refusal that another try may not meet.

    Args:
        why: What there is too much of at the moment.
    """
    return Refusal(
        429, f"{why}; ask again later", code="too_many_requests", headers={"Retry-After": "1"}
    )
