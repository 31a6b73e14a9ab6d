"""A server as a responder: any that speaks OpenAI's chat completions (vLLM, SGLang, lmdeploy, ...).

Only the standard library is used: many conversations are asked at a time by threads, what fails
for a moment is asked again, and what cannot work stops with a word on what to mend.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from cascadevl.data.conversation import thinking_answer
from cascadevl.errors import ConfigError, RequestError
from cascadevl.eval.data_url import message_fields
from cascadevl.eval.responder import Reply
from cascadevl.types import Message

_REFUSED = (400, 413, 422)
"""The server will never answer this conversation: too long, too many pictures, ..."""

_PASSING = (408, 409, 425, 429)
"""Worth another try, like everything from 500 upwards."""

_MAX_DELAY_S = 60.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class _PassingFailure(Exception):
    """A failure that may be gone at the next try; ``delay_s`` is what the server asks to wait."""

    def __init__(self, problem: str, delay_s: float = 0.0) -> None:
        super().__init__(problem)
        self.delay_s = delay_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: a key must not go elsewhere, and a POST would become a GET."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none."""


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
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"the server's address is {self.url!r}; give it as http://host:port/v1"
            )
        if self.concurrency < 1 or self.max_retries < 0 or self.timeout_s <= 0:
            raise ConfigError(
                f"concurrency is {self.concurrency}, max_retries {self.max_retries} and timeout_s "
                f"{self.timeout_s}; they must be at least 1, at least 0 and above 0"
            )

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
        content = json.dumps(body).encode()
        chance = random.Random(seed)
        for attempt in range(self.max_retries + 1):
            try:
                return self._post(content)
            except _PassingFailure as failure:
                if attempt == self.max_retries:
                    raise RequestError(
                        f"{self._endpoint}: {failure}, {attempt + 1} times in a row; is the "
                        "server up? fewer requests at a time or a longer timeout may help"
                    ) from failure
                pause = self.backoff_s * 2**attempt * chance.uniform(0.5, 1.0)
                if stop.wait(min(_MAX_DELAY_S, max(pause, failure.delay_s))):
                    break
        raise RequestError("another request failed")  # nobody sees this one

    @property
    def _endpoint(self) -> str:
        return f"{self.url.rstrip('/')}/chat/completions"

    def _post(self, content: bytes) -> Reply:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self._endpoint, content, headers, method="POST")
        # A proxy of the environment is for other machines, never for this one.
        is_here = urlsplit(self.url).hostname in _LOOPBACK
        proxies = [urllib.request.ProxyHandler({})] if is_here else []
        opener = urllib.request.build_opener(_NoRedirect, *proxies)
        try:
            with opener.open(request, timeout=self.timeout_s) as response:
                return self._read(response.read())
        except urllib.error.HTTPError as error:
            return self._refusal(error)
        except TimeoutError as error:
            raise _PassingFailure(f"no answer for {self.timeout_s:g} s") from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _PassingFailure(f"no connection within {self.timeout_s:g} s") from error
            raise _PassingFailure(f"cannot be reached ({error.reason})") from error
        except (OSError, http.client.HTTPException) as error:
            raise _PassingFailure(f"the connection broke ({error!r})") from error

    def _refusal(self, error: urllib.error.HTTPError) -> Reply:
        """What an error status means.

        Raises:
            RequestError: If asking again cannot help.
        """
        with error:
            said = error.read(2000).decode("utf-8", "replace").strip()[:300]
        status = f"status {error.code} ({said or error.reason})"
        if error.code in _REFUSED:
            return Reply("", "refused", status)
        if error.code in _PASSING or error.code >= 500:
            wish = error.headers.get("Retry-After", "")
            raise _PassingFailure(status, float(wish) if wish.isdecimal() else 0.0)
        remedy = {
            401: "give a valid API key",
            403: "this API key may not do that",
            404: f"check the address, and that the server knows a model {self.model!r}",
        }.get(error.code, "check the address")
        raise RequestError(f"{self._endpoint}: {status}; {remedy}")

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
