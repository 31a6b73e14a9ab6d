"""A vLLM server as the one who computes the answers of a language server.

The language server then holds nothing but the table of token embeddings: prompts go to vLLM as
embeddings, visual tokens in their places (`cascadevl.engine.vllm`), and its tokens come back.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace

from cascadevl.engine.http_json import Refused
from cascadevl.engine.requests import Completion, EngineStats, Request
from cascadevl.engine.threaded import from_thread
from cascadevl.engine.vllm import VllmBackend
from cascadevl.errors import RequestError, ServerError
from cascadevl.serving.engine_thread import Output
from cascadevl.serving.fleet import NOTHING

_LOOK_S = 5.0
"""A server that does not even list its models within this time is gone."""


class VllmAnswers:
    """Answers by asking a vLLM server, as many requests at a time as it has threads.

    Attributes:
        on_lost: Called when the server is gone. Its requests then neither end nor fail here:
            whoever is called has the front give them to another language server, as when an engine
            dies.
    """

    def __init__(self, backend: VllmBackend, *, concurrency: int = 256) -> None:
        """Bind a connection.

        Args:
            backend: Asks the server.
            concurrency: Requests asked at a time; more wait.
        """
        self._backend = backend
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="vllm")
        self._concurrency = concurrency
        self._stats = NOTHING
        self._num_open = 0
        self.on_lost: Callable[[], None] = lambda: None

    def stats(self) -> EngineStats:
        """What is asked at the moment, and was answered; pages are known to the server alone."""
        running = min(self._num_open, self._concurrency)
        return replace(self._stats, running=running, waiting=self._num_open - running)

    def close(self) -> None:
        """Ask nothing more; connections close with their next token."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def ask(self, request: Request) -> AsyncGenerator[Output, None]:
        """Answer a request, see `cascadevl.serving.engine_thread.Answers.ask`."""

        def produce(emit: Callable[[Output], None], stop: threading.Event) -> None:
            if stop.is_set():
                return
            for output in self._backend.outputs(request):
                emit(output)
                if stop.is_set():
                    break  # closes the connection, by which the server knows

        self._num_open += 1
        try:
            async with aclosing(from_thread(produce, self._threads)) as outputs:
                async for output in outputs:
                    if isinstance(output, Completion):
                        self._count(output)
                    if request.stream or isinstance(output, Completion):
                        yield output
        except ServerError:
            if await asyncio.to_thread(self._is_there):
                raise
            self.on_lost()
            await asyncio.Event().wait()  # until this request is called off
        finally:
            self._num_open -= 1

    def _is_there(self) -> bool:
        """Whether the server still answers."""
        quick = replace(self._backend.server, max_retries=0, timeout_s=_LOOK_S)
        try:
            quick.get("models")
        except (Refused, RequestError):
            return False
        return True

    def _count(self, answer: Completion) -> None:
        usage, known = answer.usage, self._stats
        self._stats = replace(
            known,
            decoded_tokens=known.decoded_tokens + usage.completion_tokens,
            prompt_tokens=known.prompt_tokens + (usage.prompt_tokens if not answer.sample else 0),
        )
