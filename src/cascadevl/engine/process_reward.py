"""Scoring solutions with a process reward model: P("+") of every step, in one forward.

InternVL3 report, section 2.5, and VisualPRM (arXiv 2503.10291). All candidates of a question are
branches of one packed row (docs/decisions/0004), so that the question is computed once and its
pictures are encoded once; each score is that of the solution scored alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cascadevl.data.collate import collate, num_tokens
from cascadevl.data.process_records import StepBuilder, judged_question
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.weights import evaluating
from cascadevl.errors import ConfigError, RequestError
from cascadevl.losses.process_reward import plus_probability
from cascadevl.model.head import score_targets
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.v2pe import increments_of
from cascadevl.scoring.steps import Aggregate, StepRules, aggregated, steps_of
from cascadevl.types import Batch, Example, Message

Encode: TypeAlias = Callable[[UInt8[np.ndarray, "tiles px px 3"]], Tensor]
"""Gives the visual tokens of tiles, one tile behind the other (`Engine.visual_tokens`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRewardConfig:
    """How solutions are scored.

    Attributes:
        rules: How a solution is taken apart; ``max_steps=1`` scores it as a whole, as an outcome
            reward model does.
        aggregate: How the scores of steps become one (reports: mean).
        max_tokens: Most tokens of one forward; more candidates are scored in several, of which the
            pictures are encoded once.
        chunk: Most candidates of one forward, which bounds its memory whatever their length; each
            chunk reads the question again. None for as many as ``max_tokens`` allows.
    """

    rules: StepRules = field(default_factory=StepRules)
    aggregate: Aggregate = "mean"
    max_tokens: int = 16384
    chunk: int | None = None

    def __post_init__(self) -> None:
        """Refuse a row without tokens.

        Raises:
            ConfigError: If ``max_tokens`` or ``chunk`` is not positive.
        """
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if self.chunk is not None and self.chunk < 1:
            raise ConfigError(f"chunk is {self.chunk}; it must be at least 1, or None")


@dataclass(frozen=True, slots=True, kw_only=True)
class SolutionScore:
    """What a process reward model thinks of a solution.

    Attributes:
        score: Of the whole, from 0 to 1; 0 for a solution without a step.
        steps: Its steps as they were judged.
        step_scores: P("+") of each: that all is right up to it.
    """

    score: float
    steps: tuple[str, ...]
    step_scores: tuple[float, ...]


class ProcessRewardModel:
    """A model that judges solutions."""

    def __init__(
        self,
        model: CascadeVLForConditionalGeneration,
        processor: CascadeVLProcessor,
        config: ProcessRewardConfig | None = None,
        *,
        encode: Encode | None = None,
    ) -> None:
        """Bind a model.

        Args:
            model: Trained as a process reward model; a released VisualPRM opens with
                `cascadevl.load`.
            processor: Its processor.
            config: How solutions are scored.
            encode: Whose vision half is shared, where it is the same one to the bit: pictures that
                were encoded to be answered are not encoded again to be judged.

        Raises:
            ConfigError: If its tokenizer has no tokens for "+" and "-".
        """
        self.model, self.processor = model, processor
        self.config = config or ProcessRewardConfig()
        self._encode = encode
        self._builder = StepBuilder(processor.builder, model.config.process_prompt)

    def __call__(self, prompt: Sequence[Message], solutions: Sequence[str]) -> list[SolutionScore]:
        """Score several solutions of one question, in order.

        Args:
            prompt: The conversation that they answer; its last turn is the question.
            solutions: Whole answers, thinking included.

        Raises:
            DataError: If the question cannot be used, or a solution holds control tokens or marks
                of pictures.
            RequestError: If a solution does not fit the trained context or ``max_tokens``.
        """
        taken_apart = [steps_of(text, self.config.rules) for text in solutions]
        judged = [steps for steps in taken_apart if steps]
        found = iter(self._scores(judged_question(prompt), judged) if judged else [])
        return [self._score(steps, next(found) if steps else []) for steps in taken_apart]

    def _score(self, steps: Sequence[str], scores: Sequence[float]) -> SolutionScore:
        return SolutionScore(
            score=aggregated(scores, self.config.aggregate),
            steps=tuple(steps),
            step_scores=tuple(scores),
        )

    def _scores(self, question: Message, candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        """P("+") of every step of every candidate."""
        example = self._builder.candidates(question, candidates, source="the solutions")
        groups = self._groups(example)
        visual: Tensor | None = None
        scores: list[list[float]] = []
        with evaluating(self.model), torch.inference_mode():
            for first, last in groups:
                if len(groups) > 1:
                    part = candidates[first:last]
                    example = self._builder.candidates(question, part, source="the solutions")
                batch = self._batch(example)
                if visual is None and batch.tiles is not None:
                    visual = self._visual(example, batch.tiles)
                flat = self._forward(batch, visual).tolist()
                owners = batch.target_samples.tolist()
                own = dict[int, list[float]]()
                for owner, score in zip(owners, flat, strict=True):
                    own.setdefault(owner, []).append(score)
                scores += own.values()  # targets stand in the order of their branches
        return scores

    def _visual(self, example: Example, tiles: Tensor) -> Float[Tensor, "visual hidden"]:
        if self._encode is not None:
            return self._encode(example.tiles)
        return self.model.model.encode(tiles)

    def _groups(self, example: Example) -> list[tuple[int, int]]:
        """Ranges of candidates that share a forward: as many as fit."""
        total = num_tokens(example, self.processor.tokens_per_tile)
        sizes = _branch_tokens(example)
        shared = total - sum(sizes)
        most = self.config.chunk or len(sizes)
        groups, first, used = list[tuple[int, int]](), 0, shared
        for number, size in enumerate(sizes):
            if shared + size > self.config.max_tokens:
                raise RequestError(
                    f"solution {number} has {shared + size} tokens with its question, but "
                    f"max_tokens is {self.config.max_tokens}; raise max_tokens"
                )
            if used + size > self.config.max_tokens or number - first == most:
                groups.append((first, number))
                first, used = number, shared
            used += size
        return [*groups, (first, len(sizes))]

    def _batch(self, example: Example) -> Batch:
        """One row, its pictures at the increment that the model's configuration gives them."""
        counts = [n * self.processor.tokens_per_tile for n in example.tiles_per_image]
        sizes = _branch_tokens(example)
        shared = len(example.input_ids) - len(counts) - sum(sizes)
        increments = increments_of(self.model.config, shared + max(sizes), counts, 0)
        batch = collate(
            [[replace(example, increments=increments)]],
            image_token_id=self.processor.image_token_id,
            pad_token_id=0,  # one row: nothing is filled
            tokens_per_tile=self.processor.tokens_per_tile,
            averaging="token",
            ceil_after_image=self.model.config.ceil_after_image,
        )
        return batch.to(self.model.device)

    def _forward(self, batch: Batch, visual: Tensor | None) -> Float[Tensor, " steps"]:
        body = self.model.model
        embeds = body.embed(batch.input_ids, batch.visual_index, visual)
        layout = body.layout(batch.segments, batch.parents)
        hidden_states = body.run_text(embeds, batch.position_ids, layout)
        return score_targets(
            hidden_states,
            batch.target_index,
            self.model.lm_head,
            lambda logits, _: plus_probability(logits, self._builder.tokens),
            self.model.config.text_config.vocab_size,
        )


def _branch_tokens(example: Example) -> list[int]:
    """Tokens of each branch; what they share, and what pictures expand to, left out."""
    counts: list[int] = np.bincount(example.segments, minlength=len(example.parents)).tolist()
    return counts[1:]
