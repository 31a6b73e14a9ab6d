"""A server as a responder: any that speaks OpenAI's chat completions (vLLM, SGLang, lmdeploy, ...).

Many conversations are asked at a time by threads; what fails for a moment is asked again, and what
cannot work stops with a word on what to mend (`cascadevl.engine.http_json`).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from cascadevl.data.conversation import thinking_answer
from cascadevl.engine.http_json import HttpServer, Refused
from cascadevl.errors import ConfigError, RequestError
from cascadevl.eval.data_url import message_fields
from cascadevl.eval.responder import Reply
from cascadevl.types import Message

_PATH = "chat/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class UrlResponder:
    """A model behind an OpenAI-compatible HTTP server.

    Pictures are sent as data URLs. Reasoning that the server returns in a field of its own
    (``reasoning_content`` or ``reasoning``) is put back between thinking tags.

    Attributes:
        url: Base address, for example ``http://localhost:8000/v1``.
        model: The model's name as the server knows it.
        api_key: Sent as bearer token; never shown.
        max_new_tokens: Longest answer.
        temperature: 0 for greedy answers.
        top_p: Share of probability that answers are drawn from.
        seed: Of sampled answers; each conversation gets its own from it.
        concurrency: Conversations asked at a time.
        timeout_s: Longest silence of the server.
        max_retries: How often one conversation is asked again after a passing failure.
        backoff_s: Pause before the second try; doubled each time, with chance added.
        extra: More fields of the request, such as ``chat_template_kwargs``.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    concurrency: int = 8
    timeout_s: float = 600.0
    max_retries: int = 5
    backoff_s: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: If the address is no HTTP address, or a number is out of range.
        """
        self._server.endpoint(_PATH)  # an address or a number that cannot work is refused there
        if self.concurrency < 1:
            raise ConfigError(f"concurrency is {self.concurrency}; it must be at least 1")

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """Answer all conversations, several at a time; one that is refused is answered empty.

        If the server refuses all of them, that is an error.

        Raises:
            DataError: If a picture cannot be opened.
            RequestError: If the server cannot be reached, or does not do what is asked.
        """
        return [reply.text for reply in self.sample(conversations, seed=self.seed)]

    def sample(self, conversations: Sequence[Sequence[Message]], *, seed: int) -> list[Reply]:
        """The same with another seed, and with how each answer ended.

        The first failure ends all other requests.
        """
        stop = threading.Event()
        pool = ThreadPoolExecutor(max_workers=self.concurrency, thread_name_prefix="responder")
        try:
            asked = [
                pool.submit(self._ask, conversation, seed + number, stop)
                for number, conversation in enumerate(conversations)
            ]
            done, _ = wait(asked, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises the failure, if there was one
            answers = [future.result() for future in asked]
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if answers and all(reply.finish == "refused" for reply in answers):
            raise RequestError(
                f"{self._endpoint} refused all {len(answers)} requests: {answers[0].note}; "
                "are max_new_tokens and the pictures within its limits?"
            )
        return answers

    def _ask(self, conversation: Sequence[Message], seed: int, stop: threading.Event) -> Reply:
        body = {
            **self.extra,
            "model": self.model,
            "messages": [message_fields(message) for message in conversation],
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": seed,
        }
        try:
            return self._read(self._server.post(_PATH, body, seed=seed, stop=stop))
        except Refused as refusal:
            return Reply("", "refused", str(refusal))

    @property
    def _server(self) -> HttpServer:
        return HttpServer(
            url=self.url,
            api_key=self.api_key,
            timeout_s=self.timeout_s,
            max_retries=self.max_retries,
            backoff_s=self.backoff_s,
            remedies={404: f"check the address, and that the server knows a model {self.model!r}"},
        )

    @property
    def _endpoint(self) -> str:
        return self._server.endpoint(_PATH)

    def _read(self, content: bytes) -> Reply:
        try:
            choice = json.loads(content)["choices"][0]
            message = choice["message"]
            text = message.get("content") or ""
            reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
            finish = choice.get("finish_reason")
            if not (isinstance(text, str) and isinstance(reasoning, str)):
                raise TypeError("content is no text")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise RequestError(
                f"{self._endpoint} did not answer as OpenAI's chat completions do: "
                f"{content[:200]!r}; is this the base address, ending in /v1?"
            ) from error
        if reasoning:
            cut_short = finish == "length" and not text
            text = f"<think>\n{reasoning}" if cut_short else thinking_answer(reasoning, text)
        return Reply(text, "length" if finish == "length" else "stop")
