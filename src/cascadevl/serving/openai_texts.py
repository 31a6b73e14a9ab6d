"""Replies to requests for continuations: the older form, in which text is text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cascadevl.engine.requests import Completion, TokenOutput
from cascadevl.serving.openai_answers import Head, Words
from cascadevl.serving.openai_replies import TextChoice, TextCompletion, Usage


def best(answers: Sequence[Completion], number: int) -> list[Completion]:
    """The answers whose tokens are the most probable on average.

    Args:
        answers: With log-probabilities.
        number: How many.
    """

    def mean(answer: Completion) -> float:
        logprobs = answer.logprobs or ()
        return sum(each.chosen for each in logprobs) / max(len(logprobs), 1)

    return sorted(answers, key=lambda answer: (-mean(answer), answer.sample))[:number]


def text_completion(
    head: Head, choices: Sequence[TextChoice], usage: Usage | None = None
) -> TextCompletion:
    """The reply to a request for continuations, or an event of its stream."""
    values: dict[str, Any] = {} if usage is None else {"usage": usage}
    return TextCompletion(
        id=head.id,
        object="text_completion",
        created=head.created,
        model=head.model,
        choices=list(choices),
        **values,
    )


def text_choice(answer: Completion, index: int, words: Words, *, shown: bool) -> TextChoice:
    """One continuation.

    Args:
        answer: What the engine said.
        index: Its number in the reply.
        words: Shows tokens.
        shown: Whether log-probabilities were asked for.
    """
    assert answer.finish_reason != "cancelled", "called off answers are never shown"
    logprobs = None
    if shown and answer.logprobs is not None:
        logprobs = words.text(answer.token_ids, answer.logprobs)
    return TextChoice(
        index=index, text=answer.text, logprobs=logprobs, finish_reason=answer.finish_reason
    )


@dataclass(slots=True, eq=False)
class TextEvents:
    """The events of one continuation.

    Attributes:
        index: Its number in the reply.
        words: Shows tokens.
        num_tokens: Tokens seen.
        offset: Characters of the tokens that were shown.
        last: Its last token, which waits for the end.
    """

    index: int
    words: Words
    num_tokens: int = 0
    offset: int = 0
    last: TokenOutput | None = None

    def take(self, output: TokenOutput | Completion) -> list[TextChoice]:
        """Events that an output of the engine brings."""
        if isinstance(output, TokenOutput):
            self.num_tokens += 1
            if output.finish_reason is not None:
                self.last = output
                return []
            return self._token(output)
        assert output.finish_reason != "cancelled", "called off answers are never shown"
        last, choices = self.last, []
        if last is not None:
            is_part = self.num_tokens == len(output.token_ids)
            choices = self._token(last) if is_part else self._plain(last.text)
        end = TextChoice(
            index=self.index, text="", logprobs=None, finish_reason=output.finish_reason
        )
        return [*choices, end]

    def _token(self, output: TokenOutput) -> list[TextChoice]:
        if output.logprobs is None or output.token_id is None:
            return self._plain(output.text)
        logprobs = self.words.text([output.token_id], [output.logprobs], self.offset)
        self.offset += len(logprobs.tokens[0])
        return [
            TextChoice(index=self.index, text=output.text, logprobs=logprobs, finish_reason=None)
        ]

    def _plain(self, text: str) -> list[TextChoice]:
        if not text:
            return []
        return [TextChoice(index=self.index, text=text, logprobs=None, finish_reason=None)]
