"""A running vLLM server as a backend: it holds the language half, this process the vision half.

Prompts go to its completions API as ``prompt_embeds``, so that vLLM keeps to its own environment
and serves models that are too large for one machine. The server is given the text-only checkpoint
that ``cascadevl convert --language-only`` writes (docs/concepts/vllm.md).

The payload is what ``torch.save`` writes, which a server unpickles: its address must stay private.
vLLM numbers embeddings as it numbers text, so visual tokens step by one position and by no less.
"""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.backends import Capabilities, Outcome, check_wishes, completion, ends_of
from cascadevl.engine.embeds import embed, prepared
from cascadevl.engine.http_json import HttpServer, Refused, Unanswered
from cascadevl.engine.prompts import Prompt
from cascadevl.engine.requests import Completion, Request, TokenLogprobs, TokenOutput
from cascadevl.engine.stops import AnswerText, check_stops
from cascadevl.engine.threaded import from_thread
from cascadevl.engine.vision import VisionCache
from cascadevl.engine.vllm_wire import Choice, UnknownAnswer, read_choices, request_body
from cascadevl.errors import RequestError, ServerError, UnavailableError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration

_PATH = "completions"

_NEVER = {
    "enable-prompt-embeds": "start the server with --enable-prompt-embeds",
    "hidden_size": "start the server with the language half of this very checkpoint",
}
"""Words of refusals that every request would meet, and what to do."""

_Answers: TypeAlias = tuple[Completion, ...] | RequestError


@dataclass(kw_only=True, eq=False)
class VllmBackend:
    """Answers through a vLLM server.

    Attributes:
        model: The model, or its vision half (`cascadevl.model.vision_half`); it encodes pictures
            and holds the table of token embeddings.
        processor: Its processor.
        server: The server, with its base address ending in ``/v1``.
        served_model: The language half's name as the server knows it.
        max_tokens: Most tokens of prompt and answer together, where the server says so: it would
            cut an answer short without a word.
        concurrency: Requests sent at a time; each is a group of samples.
        feature_bytes: Memory for visual tokens that are kept for a next question.
    """

    model: CascadeVLForConditionalGeneration
    processor: CascadeVLProcessor
    server: HttpServer
    served_model: str
    max_tokens: int | None = None
    concurrency: int = 16
    feature_bytes: int = 2**28

    def __post_init__(self) -> None:
        """Begin with no picture known."""
        self._vision = VisionCache(self.model, self.feature_bytes)
        self._lock = threading.Lock()  # streams come from several threads

    @property
    def capabilities(self) -> Capabilities:
        """No increments below 1, and no new weights while the server runs."""
        return Capabilities(increments=False, logprobs=True, constrained=True, weight_refresh=False)

    def answer(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        """Answer requests, several at a time, see `Backend.answer`."""
        stop = threading.Event()
        asked: dict[Future[_Answers], int] = {}
        pool = ThreadPoolExecutor(max_workers=self.concurrency, thread_name_prefix="vllm")
        try:
            for number, request in enumerate(requests):
                try:
                    prompt, body = self._prompt(request)
                except RequestError as error:
                    yield number, error
                    continue
                asked[pool.submit(self._ask, number, request, prompt, body, stop)] = number
                if len(asked) >= self.concurrency:
                    yield from _done(asked)
            while asked:
                yield from _done(asked)
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    async def stream(self, request: Request) -> AsyncIterator[TokenOutput]:
        """Answer one request token by token, see `Backend.stream`."""

        def produce(emit: Callable[[TokenOutput], None], stop: threading.Event) -> None:
            try:
                for output in self.outputs(request):
                    if isinstance(output, TokenOutput):
                        emit(output)
                    if stop.is_set():
                        break  # closes the connection, by which the server knows
            except ServerError as error:
                raise RequestError(str(error)) from error

        async for output in from_thread(produce):
            yield output

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Refuse: a vLLM server opens a checkpoint when it starts.

        Raises:
            RequestError: Always.
        """
        raise RequestError(
            f"a vLLM server cannot take {len(state)} new tensors through its completions API; "
            f"write the new checkpoint with cascadevl convert --language-only and start the "
            f"server with it"
        )

    def _prompt(self, request: Request) -> tuple[Prompt, dict[str, Any]]:
        """The prompt of a request, and what is sent for it."""
        check_wishes(request, self.capabilities, "a vLLM server")
        check_stops(self.processor, request.sampling.stop)
        with self._lock:
            prompt = prepared(request, self._vision)
        smaller = [step for step in prompt.increments if step != 1]
        if smaller:
            raise RequestError(
                f"visual tokens are to step by {smaller[0]:g} positions, but vLLM numbers "
                f"embeddings as it numbers text, by 1; use the engine, or ask for increment 1 "
                f"where the prompt fits with it"
            )
        needed = len(prompt.tokens) + request.sampling.max_tokens
        if self.max_tokens is not None and needed > self.max_tokens:
            raise RequestError(
                f"the request needs {needed} tokens ({len(prompt.tokens)} of the prompt, the "
                f"others of the answer), but the vLLM server takes {self.max_tokens}; ask for "
                f"fewer, or start it with a larger --max-model-len"
            )
        with self._lock:
            embeds = embed(prompt, self._vision)
        ends = ends_of(self.model, self.processor, request)
        return prompt, request_body(
            request, embeds, served_model=self.served_model, stop_token_ids=ends
        )

    def _text(self, request: Request) -> AnswerText:
        ends = ends_of(self.model, self.processor, request)
        return AnswerText(self.processor, request.sampling, ends)

    def _ask(
        self,
        number: int,
        request: Request,
        prompt: Prompt,
        body: Mapping[str, Any],
        stop: threading.Event,
    ) -> _Answers:
        """The answers to one request, or why the server will not give them."""
        try:
            content = self.server.post(_PATH, body, seed=number, stop=stop)
        except Refused as refusal:
            return self._refusal(refusal)
        try:
            choices, cached_tokens = read_choices(content, num_top=request.sampling.logprobs or 0)
        except UnknownAnswer as error:
            raise self._nonsense(error) from error
        if sorted(choice.index for choice in choices) != list(range(body["n"])):
            raise self._nonsense(f"{len(choices)} choices for {body['n']} samples")
        rows = {choice.index: choice for choice in choices}
        answers = []
        for sample in range(request.num_samples):
            choice = rows[sample % body["n"]]
            text = self._text(request)
            for _ in _outputs(text, choice, sample):
                pass
            answers.append(
                completion(
                    text,
                    request,
                    prompt,
                    number,
                    sample,
                    cached_tokens=cached_tokens,
                    logprobs=choice.logprobs[: len(text.token_ids)],
                )
            )
        return tuple(answers)

    def outputs(self, request: Request) -> Iterator[TokenOutput | Completion]:
        """Answer one request: its tokens as the server sends them, and every answer as it ends.

        Leaving the iterator closes the connection, by which the server knows.

        Args:
            request: What is asked.

        Raises:
            RequestError: If it cannot be answered.
            UnavailableError: If the server is gone, or has too much to do.
            ServerError: If it fails, or would answer nothing else either.
        """
        prompt, body = self._prompt(request)
        texts = [self._text(request) for _ in range(request.num_samples)]
        thoughts: list[list[TokenLogprobs]] = [[] for _ in texts]
        for choice in self._choices(body, request.sampling.logprobs or 0):
            for sample in range(choice.index, request.num_samples, body["n"]):
                text = texts[sample]
                if text.finish_reason is not None:
                    continue
                thoughts[sample] += choice.logprobs
                yield from _outputs(text, choice, sample)
                if text.finish_reason is not None:
                    known = tuple(thoughts[sample][: len(text.token_ids)])
                    yield completion(text, request, prompt, 0, sample, logprobs=known)
            if all(text.finish_reason is not None for text in texts):
                return
        raise ServerError(str(self._nonsense("the stream ended before the answers did")))

    def _choices(self, body: Mapping[str, Any], num_top: int) -> Iterator[Choice]:
        """Stretches of answers as the server streams them; see `outputs` for what it raises."""
        try:
            with self.server.stream(_PATH, {**body, "stream": True}) as events:
                for event in events:
                    yield from read_choices(event, num_top=num_top)[0]
            return
        except Refused as refusal:
            one = refusal
        except UnknownAnswer as error:
            raise ServerError(str(self._nonsense(error))) from error
        except Unanswered as error:
            raise UnavailableError(str(error)) from error
        except RequestError as error:
            raise ServerError(str(error)) from error
        try:
            why = self._refusal(one)
        except RequestError as every:
            raise ServerError(str(every)) from one
        raise why from one

    def _refusal(self, refusal: Refused) -> RequestError:
        """Why the server refuses one request.

        Raises:
            RequestError: If it would refuse every other as well.
        """
        for words, remedy in _NEVER.items():
            if words in str(refusal):
                raise RequestError(f"{self.server.endpoint(_PATH)}: {refusal}; {remedy}")
        return RequestError(f"the vLLM server refuses it: {refusal}")

    def _nonsense(self, problem: object) -> RequestError:
        return RequestError(
            f"{self.server.endpoint(_PATH)} did not answer as vLLM's completions do: {problem}; "
            f"is this the base address of a vLLM server, ending in /v1?"
        )


def connect(
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    server: HttpServer,
    *,
    served_model: str | None = None,
    concurrency: int = 16,
) -> VllmBackend:
    """A backend for a server that is up, which is asked what it serves.

    Args:
        model: The model, or its vision half.
        processor: Its processor.
        server: The server.
        served_model: Name of the model; the only one that it serves if None.
        concurrency: Requests sent at a time.

    Raises:
        RequestError: If the server cannot be reached, or does not serve that model.
    """
    where = server.endpoint("models")
    try:
        content = server.get("models")
    except Refused as refusal:
        raise RequestError(f"{where}: {refusal}") from refusal
    try:
        limits = {str(each["id"]): _limit(each) for each in json.loads(content)["data"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{where} lists no models ({error!r}); does it end in /v1?") from error
    if served_model is None and len(limits) == 1:
        served_model = next(iter(limits))
    if served_model not in limits:
        raise RequestError(
            f"{where} lists {', '.join(limits) or 'no models'}, "
            + ("name one of them" if served_model is None else f"but not {served_model!r}")
        )
    return VllmBackend(
        model=model,
        processor=processor,
        server=server,
        served_model=served_model,
        max_tokens=limits[served_model],
        concurrency=concurrency,
    )


def _limit(model: Mapping[str, Any]) -> int | None:
    """Most tokens that a listed model takes, if the list says so."""
    limit = model.get("max_model_len")
    return None if limit is None else int(limit)


def _done(asked: dict[Future[_Answers], int]) -> Iterator[Outcome]:
    """Wait for at least one request, and give those that are done."""
    done, _ = wait(asked, return_when=FIRST_COMPLETED)
    for future in done:
        yield asked.pop(future), future.result()


def _outputs(text: AnswerText, choice: Choice, sample: int) -> Iterator[TokenOutput]:
    """What an answer, or a stretch of one, adds to a text; what stands behind its end is left out.

    Args:
        text: Takes the tokens.
        choice: Has them.
        sample: Of the request.
    """

    def output(token: int | None, piece: str, logprobs: TokenLogprobs | None) -> TokenOutput:
        return TokenOutput(
            request_id=0,
            sample=sample,
            token_id=token,
            text=piece,
            logprobs=logprobs,
            finish_reason=text.finish_reason,
        )

    for place, token in enumerate(choice.token_ids):
        if text.finish_reason is not None:
            return
        piece = text.take(token)
        yield output(token, piece, choice.logprobs[place] if choice.logprobs else None)
    if choice.finish_reason is not None and text.finish_reason is None:
        rest = text.cancel()
        text.finish_reason = choice.finish_reason  # the server saw an end that the text does not
        yield output(None, rest, None)
