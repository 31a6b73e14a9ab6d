"""A reply to a conversation as the events of a stream: as it is written, or once it is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cascadevl.engine.best_of_n import Candidate, ranked
from cascadevl.engine.requests import Completion, TokenOutput
from cascadevl.serving.answer_parts import (
    AnswerParts,
    CallArguments,
    CallName,
    Content,
    Piece,
    Reasoning,
)
from cascadevl.serving.openai_answers import (
    Head,
    Words,
    call_id,
    chat_usage,
    finish_of,
    parts_of,
    step_scores_of,
)
from cascadevl.serving.openai_prompts import Asked
from cascadevl.serving.openai_replies import (
    ChatAnswer,
    ChatChunk,
    ChatDelta,
    ChatLogprobs,
    FinishReason,
    FunctionCall,
    ToolCall,
    VerificationReply,
)


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
        answers: Those that have ended; where the best are given, all that were drawn.
        given: Those that the client has got, each with its number.
    """

    asked: Asked
    head: Head
    words: Words
    answers: list[Completion] = field(default_factory=list)
    given: list[tuple[int, Completion]] = field(default_factory=list)
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

    def chosen(self, candidates: Sequence[Candidate]) -> list[ChatChunk]:
        """Events of the best answers, the best first; a part of an answer is a piece of it.

        Log-probabilities of all its tokens come with the first piece, score and steps with the end.

        Args:
            candidates: All answers that were drawn.
        """
        self.answers += [each.completion for each in candidates]
        events: list[ChatChunk] = []
        for index, place in enumerate(ranked(candidates)[: self.asked.num_best]):
            events += self._whole(index, candidates[place])
            self.given.append((index, candidates[place].completion))
            events[-1].num_drawn = len(candidates)
        return events

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
            usage=chat_usage(self.asked, self.answers, self.words),
        )

    def _whole(self, index: int, candidate: Candidate) -> list[ChatChunk]:
        """Events of an answer that is known."""
        answer, choice = candidate.completion, _Choice(parts_of(self.asked))
        pieces = choice.parts.push(answer.text) + choice.parts.flush()
        deltas = [self._delta(choice, piece) for piece in pieces] or [ChatAnswer(content="")]
        logprobs = None
        if answer.logprobs is not None:
            logprobs = self.words.chat(answer.token_ids, answer.logprobs)
        shown = [logprobs, *[None] * len(deltas)]
        reason = finish_of(answer, choice.has_calls)
        end = self._event(index, ChatAnswer(), finish_reason=reason)
        end.choices[0].score = candidate.score
        if candidate.steps:
            end.choices[0].step_scores = step_scores_of(candidate)
        return [
            self._event(index, ChatAnswer(role="assistant", content="")),
            *[
                self._event(index, delta, logprobs=each)
                for delta, each in zip(deltas, shown, strict=False)
            ],
            end,
        ]

    def _end(self, choice: _Choice, answer: Completion) -> list[ChatChunk]:
        self.answers.append(answer)
        self.given.append((answer.sample, answer))
        events: list[ChatChunk] = []
        last = choice.last
        pieces = choice.parts.push(last.text if last else "") + choice.parts.flush()
        if last is not None and choice.num_tokens == len(answer.token_ids):
            events += self._token(choice, last, pieces)
        else:  # a stop token, which is not part of the answer
            events += [self._event(answer.sample, self._delta(choice, each)) for each in pieces]
        reason = finish_of(answer, choice.has_calls)
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
                call = ToolCall(index=index, id=call_id(), type="function", function=function)
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
