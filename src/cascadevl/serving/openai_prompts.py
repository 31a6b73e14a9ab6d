"""From the body of a request to what the engine is asked.

Pictures and videos come as data URLs only: a server opens no file and no address that a stranger
names.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

from cascadevl.data.chat import to_messages
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.best_of_n import BestOfConfig
from cascadevl.engine.critics import Critics
from cascadevl.engine.requests import Request, TextIds
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import DataError, RequestError
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.routing import KeepShare, VisualBudget, parse_budget
from cascadevl.sequence import INCREMENTS
from cascadevl.serving.answer_parts import CALL_END
from cascadevl.serving.best_of import choice_of
from cascadevl.serving.limits import Limits, check_pictures, check_text, check_tokens
from cascadevl.serving.openai_forms import answer_schema, must_call, tool_shown
from cascadevl.serving.openai_schema import (
    Asking,
    AssistantMessage,
    ChatRequest,
    CompletionRequest,
    ImagePart,
    TextPart,
    VideoPart,
)
from cascadevl.types import Example, Message

_Turn: TypeAlias = dict[str, object]

_SHORT = 16
"""Tokens of a continued text where nobody says how many (OpenAI's number)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the engine is asked, and how its answers are to be read.

    Attributes:
        request: For the engine.
        begins_thinking: The prompt has opened the reasoning.
        calls: Tools may be called.
        is_call: An answer is one call, in JSON.
        num_best: Of all answers, how many are given: the most probable ones of continuations, or
            the best by ``choice``.
        choice: How the best answers to a conversation are found.
        messages: The conversation, for who judges answers to it.
    """

    request: Request
    begins_thinking: bool = False
    calls: bool = False
    is_call: bool = False
    num_best: int | None = None
    choice: BestOfConfig | None = None
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asker:
    """Makes the engine's requests.

    Attributes:
        processor: Makes prompts.
        config: Of the model.
        max_tokens: Most tokens of an answer where a request names none.
        visual_budget: Which tiles are compressed where a request does not say; the model's own
            thresholds if None.
        limits: Most that a request may bring and ask.
        critics: What the best answers can be chosen by.
    """

    processor: CascadeVLProcessor
    config: CascadeVLConfig
    max_tokens: int = 1024
    visual_budget: VisualBudget | None = None
    limits: Limits = field(default_factory=Limits)
    critics: Critics = field(default_factory=Critics)

    def chat(self, body: ChatRequest) -> Asked:
        """What a conversation asks.

        Args:
            body: The request.

        Raises:
            RequestError: If wishes exclude each other or cannot be fulfilled.
            ConfigError: The same, of wishes about the best of several answers.
            DataError: If a message or picture cannot be used.
        """
        choice = choice_of(body, self.critics)
        _check_thinking(body)
        schema = answer_schema(body)
        if schema is not None and body.thinking:
            raise RequestError(
                "an answer that must be JSON cannot reason first; leave out thinking, or "
                "response_format and tool_choice"
            )
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError("top_logprobs is given, but logprobs is not true; set it")
        messages, example = self._read(body)
        max_tokens = body.max_completion_tokens or body.max_tokens
        if max_tokens is None:
            max_tokens = self._room(example, body.increment)
        num_prompt = _num_text(example) + example.num_tiles * self.config.tokens_per_tile
        check_tokens(num_prompt, body.best_of or body.n or 1, max_tokens, self.limits)
        num_top = (body.top_logprobs or 0) if body.logprobs else None
        calls = bool(body.tools) and body.tool_choice in (None, "auto") and schema is None
        # Where only one call is wanted, the answer ends with the first.
        ends = (CALL_END,) if calls and body.parallel_tool_calls is False else ()
        sampling = _sampling(body, max_tokens, logprobs=num_top, json_schema=schema, ends=ends)
        request = Request(
            prompt=example,
            sampling=sampling,
            num_samples=body.n or 1,
            increments=body.increment,
            visual_budget=self._budget(body.visual_budget),
            thinking_budget=body.thinking_budget,
            stream=bool(body.stream) and choice is None,  # the best are known at their ends
        )
        is_call = bool(body.tools) and must_call(body)
        return Asked(
            request=request,
            begins_thinking=bool(body.thinking),
            calls=calls,
            is_call=is_call,
            num_best=None if choice is None else body.n or 1,
            choice=choice,
            messages=() if choice is None else messages,
        )

    def completions(self, body: CompletionRequest) -> list[Asked]:
        """What each prompt of a request for continuations asks.

        Args:
            body: The request.

        Raises:
            RequestError: If wishes exclude each other or cannot be fulfilled.
        """
        num, num_best = body.n or 1, body.best_of
        if num_best is not None and num_best < num:
            raise RequestError(f"best_of is {num_best}, but n is {num}; draw at least as many")
        if num_best is not None and num_best > num and body.stream:
            raise RequestError(
                f"the best {num} of {num_best} continuations are known at their ends only; leave "
                f"out stream or best_of"
            )
        chooses = num_best is not None and num_best > num
        logprobs = 0 if chooses and body.logprobs is None else body.logprobs
        asked = []
        prompts, max_tokens = self._prompts(body), body.max_tokens or _SHORT
        num_answers = len(prompts) * (num_best or num)
        check_tokens(sum(map(len, prompts)), num_answers, max_tokens, self.limits)
        for ids in prompts:
            sampling = _sampling(body, max_tokens, logprobs=logprobs)
            request = Request(
                prompt=(TextIds(tuple(ids)),),
                sampling=sampling,
                num_samples=num_best or num,
                stream=bool(body.stream),
            )
            asked.append(Asked(request=request, num_best=num if chooses else None))
        return asked

    def _budget(self, asked: float | str | None) -> VisualBudget | None:
        if asked is None:
            return self.visual_budget
        return parse_budget(asked) if isinstance(asked, str) else KeepShare(asked)

    def _read(self, body: ChatRequest) -> tuple[tuple[Message, ...], Example]:
        """The conversation, and what a model is asked."""
        with TemporaryDirectory(prefix="cascadevl-") as folder:
            try:
                asked = _turns(body, Path(folder))
                check_pictures(asked, self.processor.builder.config, self.limits)
                turns = to_messages(asked, calls=bool(body.tools))
                return turns, self.processor.prompt(
                    turns,
                    thinking=body.thinking,
                    force_thinking=body.thinking is not None,
                    tools=[tool_shown(tool) for tool in body.tools or ()] or None,
                )
            except DataError as error:  # where a video stood for a moment is nobody's business
                problem = error.problem.replace(f"{folder}/", "")
                raise DataError(
                    problem, kind=error.kind, field=error.field, remedy=error.remedy
                ) from error

    def _prompts(self, body: CompletionRequest) -> list[list[int]]:
        prompt = body.prompt
        each: Sequence[str | list[int]]
        if isinstance(prompt, str):
            each = [prompt]
        elif isinstance(prompt[0], int):
            each = [[number for number in prompt if isinstance(number, int)]]
        else:
            each = [item for item in prompt if not isinstance(item, int)]
        check_text(sum(len(item) for item in each if isinstance(item, str)), self.limits)
        found = [self._ids(item) if isinstance(item, str) else item for item in each]
        if not all(found):
            raise RequestError("a prompt is empty; an answer needs at least one token before it")
        return found

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer(text, verbose=False).input_ids
        return ids

    def _room(self, example: Example, increment: float | None) -> int:
        """Tokens of an answer where nobody says how many: what fits, up to the usual number."""
        context = self.config.trained_context
        if context is None:
            return self.max_tokens
        rule = self.config.increment if increment is None else increment
        smallest = min(INCREMENTS) if isinstance(rule, str) else rule
        num_visual = example.num_tiles * self.config.tokens_per_tile
        room = int(context - _num_text(example) - num_visual * smallest)
        return max(1, min(self.max_tokens, room))


def _num_text(example: Example) -> int:
    """Tokens of a prompt without those of its pictures."""
    return len(example.input_ids) - len(example.tiles_per_image)


def _check_thinking(body: ChatRequest) -> None:
    if body.thinking is False and body.thinking_budget is not None:
        raise RequestError(
            "thinking_budget is given, but thinking is false, which leaves nothing to budget; "
            "leave out one of them"
        )


def _sampling(
    body: Asking,
    max_tokens: int,
    *,
    logprobs: int | None,
    json_schema: str | None = None,
    ends: tuple[str, ...] = (),
) -> SamplingParams:
    """Wishes with OpenAI's defaults: temperature 1, and another seed each time."""
    seed = secrets.randbits(64) if body.seed is None else body.seed % 2**64
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return SamplingParams(
        temperature=1.0 if body.temperature is None else float(body.temperature),
        top_p=1.0 if body.top_p is None else float(body.top_p),
        top_k=body.top_k or 0,
        min_p=float(body.min_p or 0.0),
        repetition_penalty=float(body.repetition_penalty or 1.0),
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        stop=(*stop, *ends),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        json_schema=json_schema,
    )


def _turns(body: ChatRequest, folder: Path) -> list[_Turn]:
    """The conversation as a processor reads it; videos are written into a folder."""
    turns: list[_Turn] = []
    num_videos = 0
    for number, message in enumerate(body.messages):
        place = f"messages.{number}"
        role = "system" if message.role == "developer" else message.role
        turn: _Turn = {"role": role}
        if isinstance(message.content, str) or message.content is None:
            turn["content"] = message.content or ""
        else:
            parts: list[Mapping[str, object]] = []
            for part in message.content:
                if isinstance(part, VideoPart):
                    num_videos += 1
                    file = folder / f"video{num_videos}"
                    file.write_bytes(_content_of(part.video_url.url, "video", place))
                    parts.append({"type": "video", "path": file})
                else:
                    parts.append(_part(part, place))
            turn["content"] = parts
        if isinstance(message, AssistantMessage) and message.tool_calls:
            calls = [call.function.model_dump() for call in message.tool_calls]
            turn["tool_calls"] = [{"function": call} for call in calls]
        turns.append(turn)
    return turns


def _part(part: TextPart | ImagePart, place: str) -> Mapping[str, object]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image", "image": _content_of(part.image_url.url, "image", place)}


def _content_of(url: str, kind: str, place: str) -> bytes:
    """What a data URL holds.

    Raises:
        RequestError: If it is another address, or cannot be decoded.
    """
    header, comma, data = url.partition(",")
    if not url.startswith("data:"):
        raise RequestError(
            f"{place} shows the {kind} {url[:60]!r}; only data URLs are opened here: send it as "
            f"data:{kind}/...;base64,..."
        )
    if not comma or not header.endswith(";base64"):
        raise RequestError(f"{place} shows a data URL that is not base64; encode it in base64")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"a data URL of {place} is not base64 ({error})") from error
