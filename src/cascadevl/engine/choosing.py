"""The next tokens of all running answers: their wishes, random streams and grammars."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.answers import AnswerState
from cascadevl.engine.constrained import Grammar, Grammars
from cascadevl.engine.requests import Request
from cascadevl.engine.sampler import Allowed, Sampled, sample
from cascadevl.engine.sampling import SamplingTable
from cascadevl.engine.stops import check_stops
from cascadevl.engine.thinking import with_forced
from cascadevl.errors import RequestError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration


class Chooser:
    """Chooses tokens for one model."""

    def __init__(
        self, model: CascadeVLForConditionalGeneration, processor: CascadeVLProcessor | None
    ) -> None:
        """Begin with no answers.

        Args:
            model: Whose logits come.
            processor: Stop strings and grammars speak of its text.
        """
        self._model, self._processor = model, processor
        self._wishes = SamplingTable(int(model.config.text_config.vocab_size), model.device)
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()  # requests are checked while a step is computed

    def __len__(self) -> int:
        """Answers whose wishes are held."""
        return len(self._wishes)

    def check(self, request: Request) -> None:
        """Refuse wishes that cannot be fulfilled.

        Raises:
            RequestError: If a stop string cannot come or a JSON schema cannot be followed.
        """
        sampling = request.sampling
        if self._processor is not None:
            check_stops(self._processor, sampling.stop)
        elif sampling.stop or sampling.json_schema is not None:
            raise RequestError(
                "stop strings and json_schema speak of text, but the engine has no processor; "
                "give it one, or use stop_token_ids"
            )
        elif request.thinking_budget is not None:
            raise RequestError(
                "thinking_budget needs to know how reasoning is written, but the engine has no "
                "processor; give it one"
            )
        if sampling.json_schema is not None:
            self._grammar(sampling.json_schema)

    @torch.inference_mode()
    def choose(
        self, logits: Float[Tensor, "answers vocab"], states: Sequence[AnswerState]
    ) -> Sampled:
        """The next token of each answer.

        Args:
            logits: What follows each of them.
            states: The answers, in the order of the logits.

        Raises:
            LogitsError: If logits are not finite.
        """
        for state in states:
            if state.row < 0:
                self._begin(state)
        rows = np.array([state.row for state in states], dtype=np.int64)
        counters = np.array([len(state.job.generated) for state in states], dtype=np.int64)
        return sample(logits, self._wishes, rows, counters, self._allowed(states))

    def _allowed(self, states: Sequence[AnswerState]) -> Allowed | None:
        """What grammars allow, and what reasoning that has been long enough forces."""
        followed = {
            place: state.grammar for place, state in enumerate(states) if state.grammar is not None
        }
        allowed = None
        if followed:
            assert self._grammars is not None
            allowed = self._grammars.allowed(followed)
        forced = {
            place: token
            for place, state in enumerate(states)
            if state.reasoning is not None and (token := state.reasoning.forced) is not None
        }
        return with_forced(allowed, forced, self._wishes.vocab_size)

    def release(self, state: AnswerState) -> None:
        """Forget the wishes of an answer that has ended."""
        if state.row >= 0:
            self._wishes.remove(state.row)
            state.row = -1

    def _begin(self, state: AnswerState) -> None:
        """Note what an answer wishes, before its first token."""
        sampling, job = state.request.sampling, state.job
        is_penalised = sampling.repetition_penalty != 1
        state.row = self._wishes.add(
            f"request {job.arrival}, sample {job.sample}",
            sampling,
            number=job.sample,
            token_ids=job.prompt.ids if is_penalised else (),
            end_ids=tuple(state.ends) if sampling.min_tokens else (),
        )
        if sampling.json_schema is not None:
            state.grammar = self._grammar(sampling.json_schema)

    def _grammar(self, schema: str) -> Grammar:
        with self._lock:
            if self._grammars is None:
                assert self._processor is not None
                settings = self._model.generation_config
                eos = settings.eos_token_id if settings else None
                self._grammars = Grammars(
                    self._processor.tokenizer,
                    int(self._model.config.text_config.vocab_size),
                    self._processor.stop_token_ids(eos),
                )
            return self._grammars.begin(schema)
