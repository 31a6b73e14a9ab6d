"""From what the engine says to replies of OpenAI's form, at once or as a stream of events."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.best_of_n import Candidate, ranked
from cascadevl.engine.requests import Completion, TokenLogprobs, TokenOutput
from cascadevl.engine.text_stream import token_bytes
from cascadevl.serving.answer_parts import (
    AnswerParts,
    CallArguments,
    CallName,
    Content,
    Piece,
    Reasoning,
    WholeAnswer,
    joined,
)
from cascadevl.serving.openai_prompts import Asked
from cascadevl.serving.openai_replies import (
    LEAST_LOGPROB,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    FinishReason,
    FunctionCall,
    PromptDetails,
    StepScore,
    TextLogprobs,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    Usage,
    VerificationReply,
)


@dataclass(frozen=True, slots=True)
class Head:
    """What all events of one reply have in common.

    Attributes:
        id: Of the reply.
        created: When, in seconds since 1970.
        model: Name of the model.
    """

    id: str
    created: int
    model: str


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """Tokens as log-probabilities show them."""

    processor: CascadeVLProcessor

    def word(self, token: int) -> str:
        """A token; one that is part of a character as its bytes."""
        content = token_bytes(self.processor.tokenizer, token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def top(self, token: int, logprob: float) -> TopLogprob:
        """A token and how probable it was."""
        content = token_bytes(self.processor.tokenizer, token)
        return TopLogprob(token=self.word(token), logprob=finite(logprob), bytes=list(content))

    def chat(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> ChatLogprobs:
        """Log-probabilities of a stretch of an answer."""
        content = []
        for token, known in zip(ids, logprobs, strict=True):
            taken = self.top(token, known.chosen)
            top = [self.top(each, logprob) for each, logprob in known.top]
            content.append(TokenLogprob(**taken.model_dump(), top_logprobs=top))
        return ChatLogprobs(content=content)

    def text(
        self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs], offset: int = 0
    ) -> TextLogprobs:
        """The same in the older form; the first token stands at ``offset`` of the text."""
        words = [self.word(token) for token in ids]
        offsets = []
        for word in words:
            offsets.append(offset)
            offset += len(word)
        top = [{self.word(t): finite(value) for t, value in each.top} for each in logprobs]
        return TextLogprobs(
            tokens=words,
            token_logprobs=[finite(each.chosen) for each in logprobs],
            top_logprobs=top if any(top) else None,
            text_offset=offsets,
        )


def finite(logprob: float) -> float:
    """A log-probability that JSON can say."""
    return max(logprob, LEAST_LOGPROB)


def usage_of(answers: Sequence[Completion]) -> Usage:
    """What the answers to one prompt took together.

    Args:
        answers: The answers. They share the prompt, which the first of them has read.
    """
    usages = [answer.usage for answer in answers]
    completion = sum(usage.completion_tokens for usage in usages)
    prompt = usages[0].prompt_tokens
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptDetails(
            cached_tokens=min(usage.cached_tokens for usage in usages),
            visual_tokens=usages[0].visual_tokens,
            tiles=usages[0].tiles,
            compressed_tiles=usages[0].compressed_tiles,
            tokens_per_tile=list(answers[0].tokens_per_tile),
        ),
    )


def sum_of(usages: Sequence[Usage]) -> Usage:
    """What several prompts took together."""
    details = [usage.prompt_tokens_details for usage in usages]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        total_tokens=sum(usage.total_tokens for usage in usages),
        prompt_tokens_details=PromptDetails(
            cached_tokens=sum(each.cached_tokens for each in details),
            visual_tokens=sum(each.visual_tokens for each in details),
            tiles=sum(each.tiles for each in details),
            compressed_tiles=sum(each.compressed_tiles for each in details),
            tokens_per_tile=[number for each in details for number in each.tokens_per_tile],
        ),
    )


def parts_of(asked: Asked) -> AnswerParts:
    """What takes an answer to a request apart."""
    return AnswerParts(
        begins_thinking=asked.begins_thinking, calls=asked.calls, is_call=asked.is_call
    )


def chat_completion(
    asked: Asked, answers: Sequence[Completion], head: Head, words: Words
) -> ChatCompletion:
    """The reply to a conversation.

    Args:
        asked: What was asked.
        answers: All answers, in order.
        head: Of the reply.
        words: Shows tokens.
    """
    return ChatCompletion(
        id=head.id,
        object="chat.completion",
        created=head.created,
        model=head.model,
        choices=[_chat_choice(asked, answer, words, answer.sample) for answer in answers],
        usage=usage_of(answers),
    )


def best_completion(
    asked: Asked, candidates: Sequence[Candidate], head: Head, words: Words
) -> ChatCompletion:
    """The reply to a conversation whose best answers were wished, with what speaks for each.

    Args:
        asked: What was asked.
        candidates: All answers that were drawn.
        head: Of the reply.
        words: Shows tokens.
    """
    choices = []
    for index, place in enumerate(ranked(candidates)[: asked.num_best]):
        candidate = candidates[place]
        choice = _chat_choice(asked, candidate.completion, words, index)
        choice.score = candidate.score
        if candidate.steps:
            choice.step_scores = [
                StepScore(text=text, score=score)
                for text, score in zip(candidate.steps, candidate.step_scores, strict=True)
            ]
        choices.append(choice)
    return ChatCompletion(
        id=head.id,
        object="chat.completion",
        created=head.created,
        model=head.model,
        choices=choices,
        usage=usage_of([each.completion for each in candidates]),
        num_drawn=len(candidates),
    )


def whole_of(asked: Asked, answer: Completion) -> WholeAnswer:
    """An answer taken apart."""
    parts = parts_of(asked)
    return joined([*parts.push(answer.text), *parts.flush()])


def _chat_choice(asked: Asked, answer: Completion, words: Words, index: int) -> ChatChoice:
    whole = whole_of(asked, answer)
    fields: dict[str, Any] = {}
    if whole.reasoning:
        fields["reasoning_content"] = whole.reasoning
    if whole.calls:
        calls = [
            ToolCall(
                id=_call_id(),
                type="function",
                function=FunctionCall(name=call.name, arguments=call.arguments),
            )
            for call in whole.calls
        ]
        fields["tool_calls"] = calls
    content = whole.content or (None if whole.calls else "")
    logprobs = None
    if answer.logprobs is not None:
        logprobs = words.chat(answer.token_ids, answer.logprobs)
    return ChatChoice(
        index=index,
        message=ChatAnswer(role="assistant", content=content, **fields),
        logprobs=logprobs,
        finish_reason=_finish(answer, bool(whole.calls)),
    )


def _finish(answer: Completion, has_calls: bool) -> FinishReason:
    assert answer.finish_reason != "cancelled", "called off answers are never shown"
    return "tool_calls" if has_calls and answer.finish_reason == "stop" else answer.finish_reason


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


@dataclass(slots=True, eq=False)
class _Choice:
    """One answer while it is streamed.

    Attributes:
        parts: Takes it apart.
        num_tokens: Tokens seen.
        has_calls: Whether a call has begun.
        last: Its last token, which waits for the end.
    """

    parts: AnswerParts
    num_tokens: int = 0
    has_calls: bool = False
    last: TokenOutput | None = None


@dataclass(slots=True, eq=False)
class ChatStream:
    """The events of the reply to a conversation.

    Attributes:
        asked: What was asked.
        head: Of the reply.
        words: Shows tokens.
        answers: Those that have ended.
    """

    asked: Asked
    head: Head
    words: Words
    answers: list[Completion] = field(default_factory=list)
    _choices: dict[int, _Choice] = field(default_factory=dict)

    def take(self, output: TokenOutput | Completion) -> list[ChatChunk]:
        """Events that an output of the engine brings."""
        events: list[ChatChunk] = []
        choice = self._choices.get(output.sample)
        if choice is None:
            choice = self._choices[output.sample] = _Choice(parts_of(self.asked))
            opening = ChatAnswer(role="assistant", content="")
            events.append(self._event(output.sample, opening))
        if isinstance(output, Completion):
            return events + self._end(choice, output)
        choice.num_tokens += 1
        if output.finish_reason is not None:
            choice.last = output  # whether it is shown is known with the whole answer
            return events
        return events + self._token(choice, output, choice.parts.push(output.text))

    def verified(self, sample: int, found: VerificationReply) -> ChatChunk:
        """The event that says what was found of the claims of an answer."""
        event = self._event(sample, ChatAnswer())
        event.choices[0].verification = found
        return event

    def usage(self) -> ChatChunk:
        """The event that says what the request took."""
        head = self.head
        return ChatChunk(
            id=head.id,
            object="chat.completion.chunk",
            created=head.created,
            model=head.model,
            choices=[],
            usage=usage_of(self.answers),
        )

    def _end(self, choice: _Choice, answer: Completion) -> list[ChatChunk]:
        self.answers.append(answer)
        events: list[ChatChunk] = []
        last = choice.last
        pieces = choice.parts.push(last.text if last else "") + choice.parts.flush()
        if last is not None and choice.num_tokens == len(answer.token_ids):
            events += self._token(choice, last, pieces)
        else:  # a stop token, which is not part of the answer
            events += [self._event(answer.sample, self._delta(choice, each)) for each in pieces]
        reason = _finish(answer, choice.has_calls)
        return [*events, self._event(answer.sample, ChatAnswer(), finish_reason=reason)]

    def _token(
        self, choice: _Choice, output: TokenOutput, pieces: Sequence[Piece]
    ) -> list[ChatChunk]:
        """Events of one token; its log-probability goes with the first of them."""
        deltas = [self._delta(choice, piece) for piece in pieces]
        logprobs = None
        if output.logprobs is not None and output.token_id is not None:
            logprobs = self.words.chat([output.token_id], [output.logprobs])
            deltas = deltas or [ChatAnswer(content="")]
        shown = [logprobs, *[None] * len(deltas)]
        return [
            self._event(output.sample, delta, logprobs=each)
            for delta, each in zip(deltas, shown, strict=False)
        ]

    def _delta(self, choice: _Choice, piece: Piece) -> ChatAnswer:
        match piece:
            case Reasoning(text):
                return ChatAnswer(reasoning_content=text)
            case Content(text):
                return ChatAnswer(content=text)
            case CallName(index, name):
                choice.has_calls = True
                function = FunctionCall(name=name, arguments="")
                call = ToolCall(index=index, id=_call_id(), type="function", function=function)
                return ChatAnswer(tool_calls=[call])
            case CallArguments(index, text):
                more = ToolCall(index=index, function=FunctionCall(arguments=text))
                return ChatAnswer(tool_calls=[more])

    def _event(
        self,
        sample: int,
        delta: ChatAnswer,
        *,
        logprobs: ChatLogprobs | None = None,
        finish_reason: FinishReason | None = None,
    ) -> ChatChunk:
        head = self.head
        choice = ChatDelta(
            index=sample, delta=delta, logprobs=logprobs, finish_reason=finish_reason
        )
        return ChatChunk(
            id=head.id,
            object="chat.completion.chunk",
            created=head.created,
            model=head.model,
            choices=[choice],
        )
