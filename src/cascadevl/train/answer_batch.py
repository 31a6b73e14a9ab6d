"""Groups of answers as packed rows, and what the model thinks of every token of them.

A question and its picture are computed once for the answers that share a row (docs/decisions/0004).
Only answers with an advantage are laid out: the others have no gradient. What the model thought
before the first update is computed in the very batches of the updates, by the same operations, so
the ratio is exactly 1 there (docs/decisions/0023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cascadevl.data.groups import group_example, parts_within
from cascadevl.data.packing import Packer, Row, size_of
from cascadevl.data.stream import CollateConfig
from cascadevl.errors import TrainingError
from cascadevl.losses.logprobs import token_entropies, token_logprobs
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.train.config import BatchConfig
from cascadevl.train.rollouts import Group
from cascadevl.types import Batch, Example

TOKEN_SUMS = ("entropy", "rollout_kl", "rollout_gap", "tokens")
"""What `scored` adds up; the last is what the others are divided by."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnswerBatch:
    """Answers that go through the model together.

    Attributes:
        rows: The packed rows; every token of every answer is a target.
        answer: Which answer each target belongs to.
        advantages: Of each answer.
        old_logprobs: Of each target, before the first update.
        engine_logprobs: Of each target, as the engine gave them.
    """

    rows: Batch
    answer: Int64[Tensor, " targets"]
    advantages: Float[Tensor, " answers"]
    old_logprobs: Float[Tensor, " targets"]
    engine_logprobs: Float[Tensor, " targets"]

    @property
    def sources(self) -> tuple[str, ...]:
        """``question#number`` of each answer, from 1 within its row; number 0 is the question."""
        return self.rows.sources

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.rows.num_tokens

    @property
    def num_tiles(self) -> int:
        """Tiles of all pictures."""
        return self.rows.num_tiles

    def to(self, device: torch.device | str) -> AnswerBatch:
        """The same batch on another device."""
        return AnswerBatch(
            rows=self.rows.to(device),
            answer=self.answer.to(device),
            advantages=self.advantages.to(device),
            old_logprobs=self.old_logprobs.to(device),
            engine_logprobs=self.engine_logprobs.to(device),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some answers of a group that share a row.

    Attributes:
        example: The question with these answers.
        advantages: Of each answer.
        engine_logprobs: Of each token, one answer after the other.
    """

    example: Example
    advantages: tuple[float, ...]
    engine_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A batch before it is made: tensors of a whole rollout batch would fill the memory.

    Attributes:
        rows: What shares each row.
        old_logprobs: Of each target, once they are known (`scored`).
    """

    rows: tuple[tuple[Part, ...], ...]
    old_logprobs: Float[Tensor, " targets"] | None = None

    def batch(self, collate: CollateConfig) -> AnswerBatch:
        """The batch, always the same bit for bit; without old log-probabilities they are 0.

        Args:
            collate: How rows become tensors.
        """
        packed = collate([[part.example for part in row] for row in self.rows])
        parts = [part for row in self.rows for part in row]
        numbers: list[int] = []  # of each sample of the batch: which answer, -1 for a question
        num_answers = 0
        for part in parts:
            size = len(part.advantages)
            numbers += [-1, *range(num_answers, num_answers + size)]
            num_answers += size
        answer = torch.tensor(numbers)[packed.target_samples]
        engine_logprobs = torch.tensor([value for part in parts for value in part.engine_logprobs])
        assert len(engine_logprobs) == len(answer), "the engine told of every token"
        return AnswerBatch(
            rows=packed,
            answer=answer,
            advantages=torch.tensor([value for part in parts for value in part.advantages]),
            old_logprobs=torch.zeros(len(answer))
            if self.old_logprobs is None
            else self.old_logprobs,
            engine_logprobs=engine_logprobs,
        )


def lay_out(groups: Sequence[Group], batch: BatchConfig, collate: CollateConfig) -> list[Plan]:
    """How the answers of some groups that can be learned from are packed.

    An answer that holds the image-context token, which models draw where nobody taught them
    not to, is left out: it stands for a picture that is not there.

    Args:
        groups: The groups of one update.
        batch: How much a row and a batch hold.
        collate: How rows become tensors.
    """
    packer: Packer[Part] = Packer(batch.row_tokens, batch.row_tiles, max(1, len(groups)))
    rows: list[Row[Part]] = []
    for number, part in enumerate(_parts(groups, batch, collate)):
        rows += packer.add(part, size_of(part.example, collate.tokens_per_tile), number)
    rows += packer.flush()
    return [
        Plan(tuple(tuple(row.items) for row in rows[first : first + batch.rows]))
        for first in range(0, len(rows), batch.rows)
    ]


def nothing_learned(group: Group, stop_token_id: int) -> Plan:
    """A batch without any gradient, for a process whose share of an update has nothing to learn.

    Args:
        group: Whose question it shows.
        stop_token_id: The one token of its answer.
    """
    example = group_example(group.asked.prompt, [(stop_token_id,)], group.increments)
    return Plan(((Part(example, (0.0,), (0.0,)),),))


def _parts(groups: Sequence[Group], batch: BatchConfig, collate: CollateConfig) -> Iterator[Part]:
    for group in groups:
        chosen = [
            (answer, advantage)
            for answer, advantage in zip(group.rollout.answers, group.advantages, strict=True)
            if advantage and collate.image_token_id not in answer.token_ids
        ]
        prompt = group.asked.prompt
        for places in parts_within(
            prompt,
            [len(answer.token_ids) for answer, _ in chosen],
            max_tokens=batch.row_tokens,
            tokens_per_tile=collate.tokens_per_tile,
        ):
            answers = [chosen[place][0] for place in places]
            yield Part(
                group_example(prompt, [each.token_ids for each in answers], group.increments),
                tuple(chosen[place][1] for place in places),
                tuple(logprob for each in answers for logprob in each.logprobs),
            )


def policy_logprobs(
    model: CascadeVLForConditionalGeneration, rows: Batch, temperature: float
) -> Float[Tensor, " targets"]:
    """Log-probability of every token under the distribution that answers are drawn from.

    Args:
        model: The model; drop path and dropout are to be off (`no_drop_path`).
        rows: The packed rows.
        temperature: Of the draws.
    """

    def head(logits: Float[Tensor, "chunk vocab"], where: slice) -> Float[Tensor, " chunk"]:
        return token_logprobs(_tempered(logits, temperature), rows.target_ids[where])

    logprobs: Tensor = model(batch=rows, head_fn=head)
    return logprobs


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Batches whose old log-probabilities are known, and sums over their tokens.

    Attributes:
        plans: The batches.
        sums: `TOKEN_SUMS`: the entropy in nats; how far engine and trainer are apart, as a
            divergence and as the mean distance of their log-probabilities; the number of tokens.
    """

    plans: list[Plan]
    sums: dict[str, float]


@torch.no_grad()
def scored(
    model: CascadeVLForConditionalGeneration,
    plans: Sequence[Plan],
    collate: CollateConfig,
    *,
    temperature: float,
    device: torch.device,
) -> Scored:
    """What the model thinks before the first update on these batches.

    ``rollout_kl`` is the estimate ``mean(exp(d) - 1 - d)`` of KL(engine || trainer), with d the
    trainer's log-probability minus the engine's: never negative, and 0 only where they agree.

    Args:
        model: The model in training, as it was when the answers were drawn.
        plans: What was laid out.
        collate: How rows become tensors.
        temperature: Of the draws.
        device: Where the model is.

    Raises:
        TrainingError: If a log-probability is not finite; names the answers.
    """
    done = []
    sums = dict.fromkeys(TOKEN_SUMS, 0.0)
    for plan in plans:
        batch = plan.batch(collate)
        rows = batch.rows.to(device)
        plain = torch.empty(len(batch.answer), device=device)
        entropies = torch.empty_like(plain)
        old = _observed(model, rows, temperature, plain, entropies).cpu()
        if not bool(torch.isfinite(old).all()):
            raise TrainingError(
                "the model's log-probabilities are not finite; answers: "
                f"{', '.join(batch.sources[:8])}; resume from the last checkpoint at a lower "
                "learning rate"
            )
        gap = (plain.cpu() - batch.engine_logprobs).double()
        sums["entropy"] += float(entropies.double().sum())
        sums["rollout_kl"] += float((gap.expm1() - gap).sum())
        sums["rollout_gap"] += float(gap.abs().sum())
        sums["tokens"] += len(gap)
        done.append(replace(plan, old_logprobs=old))
    return Scored(done, sums)


def _observed(
    model: CascadeVLForConditionalGeneration,
    rows: Batch,
    temperature: float,
    plain: Float[Tensor, " targets"],
    entropies: Float[Tensor, " targets"],
) -> Float[Tensor, " targets"]:
    """`policy_logprobs`, which also notes what holds at temperature 1."""

    def head(logits: Float[Tensor, "chunk vocab"], where: slice) -> Float[Tensor, " chunk"]:
        plain[where] = token_logprobs(logits, rows.target_ids[where])
        entropies[where] = token_entropies(logits)
        if temperature == 1:
            return plain[where]
        return token_logprobs(_tempered(logits, temperature), rows.target_ids[where])

    logprobs: Tensor = model(batch=rows, head_fn=head)
    return logprobs


def _tempered(logits: Float[Tensor, "chunk vocab"], temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature
