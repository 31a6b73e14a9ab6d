"""One answer while it is given: when it has ended, its text, and what is reported of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.cache import page_keys
from cascadevl.engine.constrained import Grammar
from cascadevl.engine.jobs import Job
from cascadevl.engine.prompts import Prompt
from cascadevl.engine.requests import (
    Completion,
    FinishReason,
    Request,
    TokenLogprobs,
    TokenOutput,
    Usage,
)
from cascadevl.engine.sampler import Sampled
from cascadevl.engine.stops import AnswerText, end_ids
from cascadevl.engine.thinking import Reasoning, opens_reasoning
from cascadevl.model.modeling import CascadeVLForConditionalGeneration


@dataclass(slots=True, eq=False)
class AnswerState:
    """One answer of a request.

    Attributes:
        job: What the scheduler knows of it.
        request: What was asked.
        prompt: What is read for it.
        ends: Tokens that end it.
        text: Makes text of tokens as they come, where stop strings or a stream need that.
        processor: Makes text of all tokens in the end.
        row: Its row in the table of sampling wishes; negative before its first token.
        grammar: Where it stands in its JSON schema, if it has one.
        reasoning: How far its reasoning is, if that has a budget.
        logprobs: What the model thought of its tokens, if the request asked.
        piece: Text that became certain with the last token.
        finish_reason: How it ended; None while it goes on.
    """

    job: Job
    request: Request
    prompt: Prompt
    ends: frozenset[int]
    text: AnswerText | None
    processor: CascadeVLProcessor | None
    row: int = -1
    grammar: Grammar | None = None
    reasoning: Reasoning | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    piece: str = ""
    finish_reason: FinishReason | None = None

    def take(self, logprobs: TokenLogprobs | None) -> None:
        """Look at the token that the job has got last.

        Args:
            logprobs: What the model thought of it, if the request asked.
        """
        if logprobs is not None:
            self.logprobs.append(logprobs)
        generated = self.job.generated
        if self.text is not None:
            self.piece = self.text.take(generated[-1])
            self.finish_reason = self.text.finish_reason
        elif generated[-1] in self.ends:
            self.finish_reason = "stop"
        elif len(generated) == self.job.max_tokens:
            self.finish_reason = "length"
        if self.grammar is not None and self.finish_reason is None:
            self._follow(self.grammar, generated[-1])
        if self.reasoning is not None and self.finish_reason is None:
            self.reasoning.take(generated[-1])

    def _follow(self, grammar: Grammar, token: int) -> None:
        """Go on in the grammar; where that has reached its limits the answer ends, not the step."""
        if not grammar.take(token):
            self.piece += self.text.cancel() if self.text is not None else ""
            self.finish_reason = "length"

    def call_off(self) -> None:
        """End the answer before its time."""
        if self.text is not None:
            self.piece = self.text.cancel()
        self.finish_reason = "cancelled"

    def output(self) -> TokenOutput:
        """The last token of a streamed answer."""
        return TokenOutput(
            request_id=self.job.arrival,
            sample=self.job.sample,
            token_id=self.job.generated[-1],
            text=self.piece,
            logprobs=self.logprobs[-1] if self.logprobs else None,
            finish_reason=self.finish_reason,
        )

    def cancelled(self) -> TokenOutput:
        """What ends a streamed answer that was called off."""
        return TokenOutput(
            request_id=self.job.arrival,
            sample=self.job.sample,
            token_id=None,
            text=self.piece,
            finish_reason="cancelled",
        )

    def completion(self) -> Completion:
        """The whole answer, once it has ended."""
        assert self.finish_reason is not None, "the answer has not ended"
        ids = self.job.generated
        end: int | None = None
        if ids and ids[-1] in self.ends:
            ids, end = ids[:-1], ids[-1]
        wants_logprobs = self.request.sampling.logprobs is not None
        return Completion(
            request_id=self.job.arrival,
            sample=self.job.sample,
            text=self._text(ids),
            token_ids=tuple(ids),
            finish_reason=self.finish_reason,
            usage=Usage(
                prompt_tokens=len(self.prompt.tokens),
                visual_tokens=self.prompt.num_visual,
                cached_tokens=self.job.cached or 0,
                completion_tokens=len(self.job.generated),
                tiles=len(self.prompt.tiles),
                compressed_tiles=self.prompt.num_compressed,
            ),
            logprobs=tuple(self.logprobs[: len(ids)]) if wants_logprobs else None,
            increments=self.prompt.increments,
            end_token=end,
            end_logprobs=self.logprobs[-1] if wants_logprobs and end is not None else None,
            tokens_per_tile=self.prompt.tokens_per_tile,
        )

    def _text(self, ids: list[int]) -> str:
        if self.text is not None:
            return self.text.text
        if self.processor is None:
            return ""
        return self.processor.decode(ids, skip_special_tokens=True)


def answer_state(
    job: Job,
    request: Request,
    prompt: Prompt,
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor | None,
) -> AnswerState:
    """The beginning of an answer.

    Args:
        job: What the scheduler knows of it.
        request: What is asked.
        prompt: The same, ready to be computed.
        model: Its generation settings name stop tokens.
        processor: Its template names others, and it makes text.
    """
    sampling = request.sampling
    eos = model.generation_config.eos_token_id if model.generation_config else None
    if processor is None:
        own = () if sampling.ignore_eos else [eos] if isinstance(eos, int) else eos or ()
        ends: tuple[int, ...] = (*own, *sampling.stop_token_ids)
    else:
        ends = end_ids(processor, sampling, eos)
    text = None
    if processor is not None and (request.stream or sampling.stop):
        text = AnswerText(processor, sampling, ends)
    state = AnswerState(job, request, prompt, frozenset(ends), text, processor)
    if processor is not None and request.thinking_budget is not None:
        is_open = opens_reasoning(processor, prompt.tokens.ids)
        state.reasoning = Reasoning(processor, request.thinking_budget, is_open=is_open)
    return state


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request whose answers have not all ended.

    Attributes:
        number: Its number.
        request: What is asked.
        prompt: The same, ready to be computed once the router has decided.
        num_left: Answers that have not ended.
        states: Answers that have begun.
    """

    number: int
    request: Request
    prompt: Prompt
    num_left: int
    states: dict[int, AnswerState] = field(default_factory=dict)

    def job(self, sample: int) -> Job:
        """One of the answers, to be computed alone."""
        return Job(self.number, sample, self.prompt.tokens, (), self.request.sampling.max_tokens)

    def leader(self, page_tokens: int) -> Job:
        """The first answer, which reads the prompt for all."""
        job = self.job(0)
        job.keys = page_keys(self.prompt.tokens, page_tokens)
        job.siblings = tuple(range(1, self.request.num_samples))
        return job


def token_logprobs(sampled: Sampled, place: int) -> TokenLogprobs:
    """What the model thought of one of the tokens that were chosen."""
    chosen, top = float(sampled.logprobs[place]), sampled.top.get(place)
    if top is None:
        return TokenLogprobs(chosen)
    pairs = zip(top.token_ids.tolist(), top.logprobs.tolist(), strict=True)
    return TokenLogprobs(chosen, tuple(pairs))
