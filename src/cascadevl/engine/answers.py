"""One answer while it is given: when it has ended, its text, and what is reported of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.cache import page_keys
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
from cascadevl.model.answer_text import AnswerWriter
from cascadevl.model.modeling import CascadeVLForConditionalGeneration


@dataclass(slots=True, eq=False)
class AnswerState:
    """One answer of a request.

    Attributes:
        job: What the scheduler knows of it.
        request: What was asked.
        prompt: What is read for it.
        ends: Tokens that end it.
        writer: Makes text of tokens as they come, where stop strings or a stream need that.
        processor: Makes text of all tokens in the end.
        row: Its row in the table of sampling wishes; negative before its first token.
        logprobs: What the model thought of its tokens, if the request asked.
    """

    job: Job
    request: Request
    prompt: Prompt
    ends: frozenset[int]
    writer: AnswerWriter | None
    processor: CascadeVLProcessor | None
    row: int = -1
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def take(self, logprobs: TokenLogprobs | None) -> None:
        """Look at the token that the job has got last.

        Args:
            logprobs: What the model thought of it, if the request asked.
        """
        generated = self.job.generated
        if logprobs is not None:
            self.logprobs.append(logprobs)
        token = generated[-1]
        if token in self.ends:
            self.finish_reason = "stop"
        elif len(generated) == self.job.max_tokens:
            self.finish_reason = "length"
        if self.writer is not None:
            self.writer.take(token)
            if self.writer.finish_reason == "stop":
                self.finish_reason = "stop"

    def output(self) -> TokenOutput:
        """The last token of a streamed answer."""
        return TokenOutput(
            request_id=self.job.arrival,
            sample=self.job.sample,
            token_id=self.job.generated[-1],
            text="" if self.writer is None else self.writer.new_text(),
            logprobs=self.logprobs[-1] if self.logprobs else None,
            finish_reason=self.finish_reason,
        )

    def cancelled(self) -> TokenOutput:
        """What ends a streamed answer that was called off."""
        return TokenOutput(
            request_id=self.job.arrival,
            sample=self.job.sample,
            token_id=None,
            text="",
            finish_reason="cancelled",
        )

    def completion(self) -> Completion:
        """The whole answer, once it has ended."""
        assert self.finish_reason is not None, "the answer has not ended"
        ids = self.job.generated
        if ids and ids[-1] in self.ends:
            ids = ids[:-1]
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
            ),
            logprobs=None if self.request.sampling.logprobs is None else self._of(ids),
            increments=self.prompt.increments,
        )

    def _of(self, ids: list[int]) -> tuple[TokenLogprobs, ...]:
        return tuple(self.logprobs[: len(ids)])

    def _text(self, ids: list[int]) -> str:
        if self.writer is not None and self.writer.finish_reason is not None:
            return self.writer.answer().text
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
    config = model.generation_config
    eos = None if config is None else config.eos_token_id
    if processor is None:
        own: tuple[int, ...] = tuple([eos] if isinstance(eos, int) else eos or ())
    else:
        own = processor.stop_token_ids(eos)
    ends = (*(() if sampling.ignore_eos else own), *sampling.stop_token_ids)
    writer = None
    if processor is not None and (request.stream or sampling.stop):
        writer = AnswerWriter(model, processor, sampling.max_tokens, sampling.stop)
        writer.ends = ends
    return AnswerState(job, request, prompt, frozenset(ends), writer, processor)


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request whose answers have not all ended.

    Attributes:
        number: Its number.
        request: What is asked.
        prompt: The same, ready to be computed.
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
