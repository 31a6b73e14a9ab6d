"""Numbers for Prometheus: what was asked, what was said, how long it took, what is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cascadevl.engine.requests import EngineStats, Usage

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

_NOW = {
    "waiting": "Answers that wait for their turn",
    "running": "Answers that are being computed",
    "pages": "Pages of keys and values there are",
    "free_pages": "Pages that nobody uses",
}
_DONE = {
    "steps": "Steps of the engine",
    "prompt_tokens": "Tokens of prompts that were computed",
    "cached_tokens": "Tokens of prompts that were found in the cache",
    "decoded_tokens": "Tokens of answers that were computed",
    "preemptions": "Answers that lost their pages and were computed again",
    "encoded_tiles": "Tiles that went through the vision tower",
    "cached_tiles": "Tiles whose visual tokens were found in the cache",
}


class _EngineCollector(Collector):
    """Asks the engine when somebody asks for its numbers."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        values = asdict(self._stats())
        for name, help_ in _NOW.items():
            yield GaugeMetricFamily(f"cascadevl_engine_{name}", help_, value=values[name])
        for name, help_ in _DONE.items():
            yield CounterMetricFamily(f"cascadevl_engine_{name}", help_, value=values[name])


class Metrics:
    """The numbers of one server."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        """Begin at zero.

        Args:
            stats: Of the engine.
        """
        self.registry = registry = CollectorRegistry()
        registry.register(_EngineCollector(stats))
        self._requests = Counter(
            "cascadevl_requests", "Requests by their end", ["route", "status"], registry=registry
        )
        self._open = Gauge("cascadevl_open_requests", "Requests in hand", registry=registry)
        self._tokens = Counter(
            "cascadevl_tokens", "Tokens of answered requests", ["kind"], registry=registry
        )
        self._first = Histogram(
            "cascadevl_first_token_seconds",
            "From the request to its first token (streams)",
            buckets=_SECONDS,
            registry=registry,
        )
        self._each = Histogram(
            "cascadevl_token_seconds",
            "From one token of a stream to the next",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self._whole = Histogram(
            "cascadevl_request_seconds",
            "From the request to the end of its answers",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )

    def begun(self) -> None:
        """A request has come."""
        self._open.inc()

    def ended(self, route: str, status: int, seconds: float) -> None:
        """A request has ended.

        Args:
            route: What was asked for.
            status: The HTTP status, or 499 where the client went away.
            seconds: How long it took.
        """
        self._open.dec()
        self._requests.labels(route, str(status)).inc()
        self._whole.labels(route).observe(seconds)

    def refused(self, route: str, status: int) -> None:
        """A request was not taken.

        Args:
            route: What was asked for.
            status: The HTTP status.
        """
        self._requests.labels(route, str(status)).inc()

    def first_token(self, seconds: float) -> None:
        """The first token of a stream, after so many seconds."""
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """Another one, so many seconds after the one before."""
        self._each.observe(seconds)

    def answered(self, usage: Usage, *, is_first: bool) -> None:
        """An answer has ended.

        Args:
            usage: What it took.
            is_first: Whether it is the first of its request: they share one prompt.
        """
        if is_first:
            self._tokens.labels("prompt").inc(usage.prompt_tokens)
            self._tokens.labels("visual").inc(usage.visual_tokens)
            self._tokens.labels("cached").inc(usage.cached_tokens)
        self._tokens.labels("completion").inc(usage.completion_tokens)

    def text(self) -> bytes:
        """All of them, in Prometheus' text form."""
        return generate_latest(self.registry)
