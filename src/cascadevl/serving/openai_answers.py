"""From what the engine says to whole replies of OpenAI's form."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.best_of_n import Candidate, ranked
from cascadevl.engine.requests import Completion, TokenLogprobs
from cascadevl.engine.text_stream import token_bytes
from cascadevl.engine.thinking import num_reasoning_tokens
from cascadevl.serving.answer_parts import AnswerParts, WholeAnswer, joined
from cascadevl.serving.openai_prompts import Asked
from cascadevl.serving.openai_replies import (
    LEAST_LOGPROB,
    ChatAnswer,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    CompletionDetails,
    FinishReason,
    FunctionCall,
    PromptDetails,
    StepScore,
    TextLogprobs,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    Usage,
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


def chat_usage(asked: Asked, answers: Sequence[Completion], words: Words) -> Usage:
    """The same of answers in a chat, whose reasoning is told apart.

    Args:
        asked: What was asked.
        answers: The answers.
        words: Knows the tokens.
    """
    usage = usage_of(answers)
    number = sum(
        num_reasoning_tokens(words.processor, answer.token_ids, is_begun=asked.begins_thinking)
        for answer in answers
    )
    usage.completion_tokens_details = CompletionDetails(reasoning_tokens=number)
    return usage


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
        usage=chat_usage(asked, answers, words),
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
            choice.step_scores = step_scores_of(candidate)
        choices.append(choice)
    return ChatCompletion(
        id=head.id,
        object="chat.completion",
        created=head.created,
        model=head.model,
        choices=choices,
        usage=chat_usage(asked, [each.completion for each in candidates], words),
        num_drawn=len(candidates),
    )


def step_scores_of(candidate: Candidate) -> list[StepScore]:
    """The steps of an answer, each with its score."""
    return [
        StepScore(text=text, score=score)
        for text, score in zip(candidate.steps, candidate.step_scores, strict=True)
    ]


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
                id=call_id(),
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
        finish_reason=finish_of(answer, bool(whole.calls)),
    )


def finish_of(answer: Completion, has_calls: bool) -> FinishReason:
    """How an answer ended, in OpenAI's words."""
    assert answer.finish_reason != "cancelled", "called off answers are never shown"
    return "tool_calls" if has_calls and answer.finish_reason == "stop" else answer.finish_reason


def call_id() -> str:
    """A new identity of a call."""
    return f"call_{secrets.token_hex(12)}"
