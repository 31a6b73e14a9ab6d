"""One request from its bytes to its reply: counted, prepared, answered, called off if need be."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from cascadevl.engine.best_of_n import Candidate
from cascadevl.engine.guard import Guard
from cascadevl.engine.requests import Completion
from cascadevl.engine.requests import Request as EngineRequest
from cascadevl.errors import CascadeVLError
from cascadevl.serving.admission import Admission, ApiConfig, InHand
from cascadevl.serving.best_of import draw_candidates
from cascadevl.serving.engine_thread import Answers, Output
from cascadevl.serving.http_errors import (
    CLIENT_GONE,
    LATER,
    ClientGone,
    Refusal,
    refusal_of,
    refusal_of_body,
)
from cascadevl.serving.limits import check_form
from cascadevl.serving.metrics import Metrics
from cascadevl.serving.openai_answers import (
    Head,
    Words,
    best_completion,
    chat_completion,
    sum_of,
    usage_of,
    whole_of,
)
from cascadevl.serving.openai_prompts import Asked, Asker
from cascadevl.serving.openai_replies import sent
from cascadevl.serving.openai_schema import Asking, ChatRequest, CompletionRequest
from cascadevl.serving.openai_stream import ChatStream
from cascadevl.serving.openai_texts import TextEvents, best, text_choice, text_completion
from cascadevl.serving.remote import Fetcher, Room
from cascadevl.serving.remote_pictures import fetch_pictures
from cascadevl.serving.verifying import Verifier
from cascadevl.serving.waiting import merged, together, unless_gone, with_signs

Body = TypeVar("Body", bound=Asking)
Made = TypeVar("Made")

_DONE = b"data: [DONE]\n\n"
_SIGN = b": still at it\n\n"


class Api:
    """Answers HTTP requests."""

    def __init__(
        self,
        answers: Answers,
        asker: Asker,
        config: ApiConfig,
        fetcher: Fetcher | None = None,
        guard: Guard | None = None,
    ) -> None:
        """Begin with nothing in hand.

        Args:
            answers: Answers.
            asker: Makes requests of bodies.
            config: Limits.
            fetcher: Fetches pictures by their addresses; None if none is fetched.
            guard: Checks answers where a request asks for it; one without documents if not given.
        """
        self.answers, self.asker, self.config = answers, asker, config
        self.metrics = Metrics(answers.stats)
        self.admission = Admission(config, self.metrics, answers.stats)
        self._fetcher = fetcher
        self._verifier = Verifier(answers=answers, guard=guard or Guard(processor=asker.processor))
        self.started = int(time.time())
        self.is_draining = False
        self._words = Words(asker.processor)
        self._preparing = ThreadPoolExecutor(config.num_preparing, thread_name_prefix="prepare")
        self._judging = ThreadPoolExecutor(1, thread_name_prefix="judge")

    @property
    def unready(self) -> Refusal | None:
        """Why no request is taken, or None where they are."""
        if self.is_draining:
            return Refusal(503, "the server is about to stop", code="draining", headers=LATER)
        if (failure := self.answers.failure) is not None:
            return Refusal(503, failure, code="broken")
        return None

    def check_model(self, name: str) -> None:
        """Refuse a model that is not served.

        Raises:
            Refusal: If it is another one.
        """
        if name != self.config.model_name:
            raise Refusal(
                404,
                f"there is no model {name!r} here; the one that is served is "
                f"{self.config.model_name!r}",
                "model",
                "model_not_found",
            )

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        head = self._head("chatcmpl")

        async def whole(body: ChatRequest, asked: Asked) -> BaseModel:
            if asked.choice is not None:
                candidates = await self._candidates(asked)
                reply = await asyncio.to_thread(
                    best_completion, asked, candidates, head, self._words
                )
            else:
                answers = await self._answers(asked.request)
                reply = await asyncio.to_thread(chat_completion, asked, answers, head, self._words)
            for choice in reply.choices if body.verify else ():
                choice.verification = await self._verifier(body, asked, choice.message.content)
            return reply

        def ask(body: ChatRequest) -> Asked:
            asked = self.asker.chat(body)
            self._verifier.check(body, asked)
            return asked

        return await self._reply(
            request,
            "chat",
            ChatRequest,
            ask,
            whole,
            lambda body, asked: self._chat_events(body, asked, head),
        )

    async def _chat_events(
        self, body: ChatRequest, asked: Asked, head: Head
    ) -> AsyncGenerator[bytes, None]:
        stream = ChatStream(asked, head, self._words)
        told = self._as_written if asked.choice is None else self._once_chosen
        async with aclosing(told(asked, stream)) as events:
            async for event in events:
                yield event
        for number, answer in stream.given if body.verify else ():
            found = await self._verifier(body, asked, whole_of(asked, answer).content)
            yield _event(stream.verified(number, found))
        if body.stream_options is not None and body.stream_options.include_usage:
            yield _event(await asyncio.to_thread(stream.usage))
        yield _DONE

    async def _as_written(self, asked: Asked, stream: ChatStream) -> AsyncGenerator[bytes, None]:
        """Events of answers while they are written."""
        async with aclosing(self._timed(asked)) as outputs:
            async for output in outputs:
                for event in stream.take(output):
                    yield _event(event)

    async def _once_chosen(self, asked: Asked, stream: ChatStream) -> AsyncGenerator[bytes, None]:
        """Events of the best answers once they are chosen; until then signs that it goes on."""
        work, every_s = self._candidates(asked), self.config.keep_alive_s
        async with aclosing(with_signs(work, every_s)) as found:
            async for candidates in found:
                if candidates is None:
                    yield _SIGN
                    continue
                for event in await asyncio.to_thread(stream.chosen, candidates):
                    yield _event(event)

    async def completions(self, request: Request) -> Response:
        """Continue texts."""
        head = self._head("cmpl")

        async def whole(body: CompletionRequest, asked: list[Asked]) -> BaseModel:
            found = await together([self._answers(each.request) for each in asked])
            usage = sum_of([usage_of(answers) for answers in found])
            shown = body.logprobs is not None
            chosen = [
                answer
                for each, answers in zip(asked, found, strict=True)
                for answer in (best(answers, each.num_best) if each.num_best else answers)
            ]
            choices = [
                text_choice(answer, index, self._words, shown=shown)
                for index, answer in enumerate(chosen)
            ]
            return text_completion(head, choices, usage)

        return await self._reply(
            request,
            "completions",
            CompletionRequest,
            self.asker.completions,
            whole,
            lambda body, asked: self._text_events(body, asked, head),
        )

    async def _text_events(
        self, body: CompletionRequest, asked: list[Asked], head: Head
    ) -> AsyncGenerator[bytes, None]:
        num_samples = asked[0].request.num_samples
        streams = [TextEvents(index, self._words) for index in range(len(asked) * num_samples)]
        usages: list[list[Completion]] = [[] for _ in asked]
        async with aclosing(merged([self._timed(each) for each in asked])) as outputs:
            async for place, output in outputs:
                if isinstance(output, Completion):
                    usages[place].append(output)
                for choice in streams[place * num_samples + output.sample].take(output):
                    yield _event(text_completion(head, [choice]))
        if body.stream_options is not None and body.stream_options.include_usage:
            usage = sum_of([usage_of(mine) for mine in usages])
            yield _event(text_completion(head, [], usage))
        yield _DONE

    async def _reply(
        self,
        request: Request,
        route: str,
        form: type[Body],
        ask: Callable[[Body], Made],
        whole: Callable[[Body, Made], Awaitable[BaseModel]],
        events: Callable[[Body, Made], AsyncGenerator[bytes, None]],
    ) -> Response:
        """Reply to one request, at once or as a stream.

        Args:
            request: The request.
            route: Names it in the numbers.
            form: Of its body.
            ask: Makes what is asked, in a thread.
            whole: Makes the reply.
            events: Makes the events of a streamed one.
        """
        hand = self.admission.take(request, route, self.unready)
        try:
            content = await hand.body()
            body, asked = await unless_gone(request, self._prepared(hand, content, form, ask))
            hand.lap("prepare")
            if not body.stream:
                reply = await unless_gone(request, whole(body, asked))
                hand.lap("answer")
                hand.end(200)
                return Response(sent(reply), media_type="application/json", headers=hand.timing)
            stream = self._counted(hand, events(body, asked))
            # The first event comes before the status is sent: a refusal still has one of its own.
            first = await unless_gone(request, anext(stream))
            hand.lap("first_token")
            return StreamingResponse(
                _chained(first, stream), media_type="text/event-stream", headers=hand.timing
            )
        except (ClientGone, ClientDisconnect):
            hand.end(CLIENT_GONE)
            return Response(status_code=CLIENT_GONE)
        except CascadeVLError as error:
            refusal = refusal_of(error)
            hand.end(refusal.status)
            return refusal.response()
        except BaseException:
            hand.end(500)
            raise

    async def _prepared(
        self, hand: InHand, content: bytes, form: type[Body], ask: Callable[[Body], Made]
    ) -> tuple[Body, Made]:
        """The body, and what it asks; both are made in threads."""

        def read() -> Body:
            try:
                body = form.model_validate_json(content)
            except ValidationError as error:
                raise refusal_of_body(error, form) from error
            self.check_model(body.model)
            if isinstance(body, ChatRequest):
                check_form(body, self.asker.limits)
            return body

        loop = asyncio.get_running_loop()
        body = await loop.run_in_executor(self._preparing, read)
        if self._fetcher is not None and isinstance(body, ChatRequest):
            room = Room(self.config.max_body_bytes, hand.hold)
            await fetch_pictures(body, self._fetcher, room)
        return body, await loop.run_in_executor(self._preparing, ask, body)

    async def _candidates(self, asked: Asked) -> list[Candidate]:
        """Answers of which the best are given."""
        assert asked.choice is not None, "somebody wishes the best"
        return await draw_candidates(
            asked.request,
            asked.messages,
            asked.choice,
            self.asker.critics,
            draw=self._answers,
            judging=self._judging,
        )

    async def _answers(self, request: EngineRequest) -> list[Completion]:
        """All answers, in order."""
        answers: list[Completion] = []
        async with aclosing(self.answers.ask(request)) as outputs:
            async for output in outputs:
                if isinstance(output, Completion):
                    self.metrics.answered(output.usage, is_first=not answers)
                    answers.append(output)
        return sorted(answers, key=lambda answer: answer.sample)

    async def _timed(self, asked: Asked) -> AsyncGenerator[Output, None]:
        """What the engine says, with the time of each token noted."""
        latest = time.monotonic()
        num_tokens = num_answers = 0
        async with aclosing(self.answers.ask(asked.request)) as outputs:
            async for output in outputs:
                if isinstance(output, Completion):
                    self.metrics.answered(output.usage, is_first=num_answers == 0)
                    num_answers += 1
                else:
                    now = time.monotonic()
                    note = self.metrics.next_token if num_tokens else self.metrics.first_token
                    note(now - latest)
                    latest, num_tokens = now, num_tokens + 1
                yield output

    async def _counted(
        self, hand: InHand, events: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[bytes, None]:
        """The events of a stream; a failure within it is the last of them."""
        is_begun = False
        try:
            async with aclosing(events):
                async for event in events:
                    yield event
                    is_begun = True
            hand.end(200)
        except CascadeVLError as error:
            refusal = refusal_of(error)
            hand.end(refusal.status)
            if not is_begun:
                raise
            yield refusal.event()
        finally:
            hand.end(CLIENT_GONE)

    def _head(self, kind: str) -> Head:
        name = f"{kind}-{secrets.token_hex(12)}"
        return Head(name, int(time.time()), self.config.model_name)


async def _chained(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


def _event(reply: BaseModel) -> bytes:
    return b"data: " + sent(reply) + b"\n\n"
