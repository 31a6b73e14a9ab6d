"""transformers' own `generate` as a backend: the reference that the others are held against.

Slow and simple: one prompt at a time, or a padded batch. Its random streams are torch's, so drawn
answers differ from those of the engine; greedy ones do not.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.backends import Capabilities, Outcome, check_wishes, completion, ends_of
from cascadevl.engine.embeds import embed, prepared
from cascadevl.engine.prompts import Prompt
from cascadevl.engine.requests import Completion, Request, TokenLogprobs, TokenOutput
from cascadevl.engine.sampling import SamplingParams
from cascadevl.engine.stops import AnswerText, check_stops
from cascadevl.engine.threaded import from_thread
from cascadevl.engine.vision import VisionCache
from cascadevl.engine.weights import evaluating, load_weights
from cascadevl.errors import RequestError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration

_NAME = "transformers' generate"

Asked: TypeAlias = tuple[int, Request, Prompt, Tensor]
"""A request with its number, its prompt, and that as embeddings."""


@dataclass(kw_only=True, eq=False)
class TransformersBackend:
    """Answers with `CascadeVLForConditionalGeneration.generate`.

    Attributes:
        model: The model.
        processor: Its processor.
        max_rows: Most greedy requests with the same wishes that are padded to one batch.
        feature_bytes: Memory for visual tokens that are kept for a next question.
    """

    model: CascadeVLForConditionalGeneration
    processor: CascadeVLProcessor
    max_rows: int = 1
    feature_bytes: int = 2**28

    def __post_init__(self) -> None:
        """Begin with no picture known."""
        self._vision = VisionCache(self.model, self.feature_bytes)
        self._lock = threading.Lock()  # streams come from several threads

    @property
    def capabilities(self) -> Capabilities:
        """All but constrained answers."""
        return Capabilities(increments=True, logprobs=True, constrained=False, weight_refresh=True)

    def answer(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        """Answer requests in their order, see `Backend.answer`."""
        batch: list[Asked] = []
        for number, request in enumerate(requests):
            try:
                asked = self._asked(number, request)
            except RequestError as error:
                yield number, error
                continue
            if batch and not _go_together(batch[0][1], request):
                yield from self._answers(batch)
                batch = []
            batch.append(asked)
            if len(batch) == self.max_rows:
                yield from self._answers(batch)
                batch = []
        if batch:
            yield from self._answers(batch)

    async def stream(self, request: Request) -> AsyncIterator[TokenOutput]:
        """Answer one request token by token, see `Backend.stream`.

        Raises:
            RequestError: If it cannot be answered; also if it asks for log-probabilities, which
                come with whole answers only.
        """
        if request.sampling.logprobs is not None:
            raise RequestError(f"{_NAME} gives logprobs with whole answers only, not in a stream")

        def produce(emit: Callable[[TokenOutput], None], stop: threading.Event) -> None:
            self._generate([self._asked(0, request)], emit, stop)

        async for output in from_thread(produce):
            yield output

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy new weights into the model, see `Backend.load`."""
        load_weights(self.model, state)
        self._vision.forget()

    def _asked(self, number: int, request: Request) -> Asked:
        check_wishes(request, self.capabilities, _NAME)
        check_stops(self.processor, request.sampling.stop)
        with self._lock:
            prompt = prepared(request, self._vision)
            return number, request, prompt, embed(prompt, self._vision)

    def _answers(self, batch: Sequence[Asked]) -> Iterator[Outcome]:
        """The answers of requests that are drawn alike."""
        texts, logits = self._generate(batch)
        rows_each = len(texts) // len(batch)
        for place, (number, request, prompt, _) in enumerate(batch):
            answers: list[Completion] = []
            for sample in range(request.num_samples):
                row = place * rows_each + sample % rows_each
                text = texts[row]
                logprobs = None if logits is None else _logprobs(logits, row, text, request)
                answers.append(completion(text, request, prompt, number, sample, logprobs=logprobs))
            yield number, tuple(answers)

    @torch.inference_mode()
    def _generate(
        self,
        batch: Sequence[Asked],
        emit: Callable[[TokenOutput], None] | None = None,
        stop: threading.Event | None = None,
    ) -> tuple[list[AnswerText], tuple[Tensor, ...] | None]:
        """Run `generate`: the text of each row, and the logits of each step if asked for.

        A request has a row for each of its samples, or one where they are greedy and so the same.

        Args:
            batch: Requests that are drawn alike.
            emit: Takes every token, if somebody waits for those of a single request.
            stop: Ends everything once it is set.
        """
        request, device = batch[0][1], self.model.device
        rows_each = 1 if request.sampling.temperature == 0 else request.num_samples
        ends = ends_of(self.model, self.processor, request)
        texts = [
            AnswerText(self.processor, request.sampling, ends)
            for _ in range(len(batch) * rows_each)
        ]
        reader = _Reader(texts, request.num_samples, emit, stop)
        rows = _padded(batch, device)
        never = int(self.model.config.text_config.vocab_size)
        cuda = [device] if device.type == "cuda" else []
        with evaluating(self.model), torch.random.fork_rng(devices=cuda):
            torch.manual_seed(request.sampling.seed)
            made = self.model.generate(
                rows.pop("ids"),
                _settings(request.sampling, rows_each, ends or (never,)),
                stopping_criteria=StoppingCriteriaList([reader]),
                **rows,
            )
        return texts, made.logits


class _Reader(StoppingCriteria):
    """Reads the rows of a batch as they grow, and says which have ended."""

    def __init__(
        self,
        texts: Sequence[AnswerText],
        num_samples: int,
        emit: Callable[[TokenOutput], None] | None,
        stop: threading.Event | None,
    ) -> None:
        self._texts, self._num_samples = texts, num_samples
        self._emit, self._stop = emit, stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        """Take the last token of every row that goes on."""
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self._texts[row].finish_reason is None:
                self._report(row, token, self._texts[row].take(token))
        is_called_off = self._stop is not None and self._stop.is_set()
        ended = [is_called_off or text.finish_reason is not None for text in self._texts]
        return torch.tensor(ended, device=input_ids.device)

    def _report(self, row: int, token: int, piece: str) -> None:
        """Tell whoever waits; greedy samples share a row."""
        if self._emit is None:
            return
        for sample in range(row, self._num_samples, len(self._texts)):
            self._emit(
                TokenOutput(
                    request_id=0,
                    sample=sample,
                    token_id=token,
                    text=piece,
                    finish_reason=self._texts[row].finish_reason,
                )
            )


def _go_together(one: Request, other: Request) -> bool:
    """Whether two requests may share a batch: greedy ones, because rows share a random stream."""
    return one.sampling == other.sampling and one.sampling.temperature == 0


def _padded(batch: Sequence[Asked], device: torch.device) -> dict[str, Any]:
    """Prompts as rows, padded on the left."""
    width = max(len(prompt.tokens) for _, _, prompt, _ in batch)

    def filled(rows: Iterable[Tensor]) -> Tensor:
        return torch.stack(
            [torch.cat([row.new_zeros(width - len(row), *row.shape[1:]), row]) for row in rows]
        )

    tokens = [prompt.tokens for _, _, prompt, _ in batch]
    ids = [torch.from_numpy(each.ids).to(device) for each in tokens]
    return {
        "ids": filled(ids),
        "attention_mask": filled(map(torch.ones_like, ids)),
        "inputs_embeds": filled(embeds for _, _, _, embeds in batch),
        "position_ids": filled(torch.from_numpy(each.positions).to(device) for each in tokens),
    }


def _settings(
    sampling: SamplingParams, num_samples: int, ends: tuple[int, ...]
) -> GenerationConfig:
    """Everything is said, because what is not is filled in from the checkpoint's settings."""
    draws = sampling.temperature > 0
    return GenerationConfig(
        do_sample=draws,
        temperature=sampling.temperature if draws else 1.0,
        top_p=sampling.top_p if draws else 1.0,
        top_k=sampling.top_k if draws else 50,  # transformers' default, which greedy never reads
        min_p=sampling.min_p if draws and sampling.min_p else None,
        repetition_penalty=sampling.repetition_penalty,
        num_beams=1,
        num_return_sequences=num_samples,
        max_new_tokens=sampling.max_tokens,
        min_new_tokens=sampling.min_tokens or None,
        eos_token_id=list(ends),
        pad_token_id=0,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=sampling.logprobs is not None,
    )


def _logprobs(
    logits: Sequence[Float[Tensor, "rows vocab"]],
    row: int,
    text: AnswerText,
    request: Request,
) -> tuple[TokenLogprobs, ...]:
    """What the model thought of each token of a row."""
    wanted = request.sampling.logprobs or 0
    found = []
    for step, token in zip(logits, text.token_ids, strict=False):
        scores = step[row].float().log_softmax(-1)
        top = scores.topk(wanted)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        found.append(TokenLogprobs(float(scores[token]), tuple(pairs)))
    return tuple(found)
