"""Visual consistency: with compressed tiles a model should say what it says with full ones.

InternVL3.5 report, section on ViCO, stage 1: ``L = E_xi[1/N sum_i KL(pi_ref(y_i | y_<i, I) ||
pi(y_i | y_<i, I_xi))]`` over the N tokens of a response. I is the image at a quarter of its patch
features, as always; I_xi has a quarter or a sixteenth, drawn for each image.

A reference's distribution is as long as the vocabulary. It is kept as its k most probable tokens
and one bucket with the mass of all others, and the model's is merged in the same way. By the
log-sum inequality that divergence is never above the whole one; it lacks ``p_rest KL(p || q)`` of
the distributions within the bucket (docs/decisions/0028 has what that comes to).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from cascadevl.losses.logprobs import blocks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopTokens:
    """What a model thinks of the next token, once for each target: its k most probable tokens.

    Attributes:
        ids: The tokens, the most probable first.
        logprobs: Their log-probabilities.
        rest: Log of the mass of all other tokens together.
    """

    ids: Int[Tensor, "targets k"]
    logprobs: Float[Tensor, "targets k"]
    rest: Float[Tensor, " targets"]

    def __len__(self) -> int:
        """Number of targets."""
        return len(self.rest)

    def at(self, where: slice) -> TopTokens:
        """Those of some targets that follow each other."""
        return TopTokens(ids=self.ids[where], logprobs=self.logprobs[where], rest=self.rest[where])

    def to(self, device: torch.device | str) -> TopTokens:
        """The same on another device."""
        return TopTokens(
            ids=self.ids.to(device, non_blocking=True),
            logprobs=self.logprobs.to(device, non_blocking=True),
            rest=self.rest.to(device, non_blocking=True),
        )

    @classmethod
    def joined(cls, parts: Sequence[TopTokens]) -> TopTokens:
        """Those of several samples, one behind the other.

        Args:
            parts: At least one, all of the same k.
        """
        return cls(
            ids=torch.cat([part.ids for part in parts]),
            logprobs=torch.cat([part.logprobs for part in parts]),
            rest=torch.cat([part.rest for part in parts]),
        )


@torch.no_grad()
def top_tokens(logits: Float[Tensor, "targets vocab"], k: int) -> TopTokens:
    """The most probable tokens of each distribution, and the mass of the others.

    Args:
        logits: Scores of the whole vocabulary.
        k: How many tokens; of a small vocabulary all but one, with which nothing is lost.

    Returns:
        Log-probabilities in float32, or float64 of float64 logits; without a gradient.
    """
    k = min(k, logits.shape[1] - 1)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    ids = torch.empty(len(logits), k, dtype=torch.int64, device=logits.device)
    logprobs = logits.new_empty(len(logits), k, dtype=dtype)
    rest = logits.new_empty(len(logits), dtype=dtype)
    for rows in blocks(logits):
        logs = logits[rows].to(dtype).log_softmax(-1)
        best = logs.topk(k)
        ids[rows], logprobs[rows] = best.indices, best.values
        rest[rows] = logs.scatter_(1, best.indices, -torch.inf).logsumexp(1)
    return TopTokens(ids=ids, logprobs=logprobs, rest=rest)


def merged_kl(
    logits: Float[Tensor, "targets vocab"], reference: TopTokens
) -> Float[Tensor, " targets"]:
    """``KL(reference || model)`` of each target, all tokens but the reference's top ones as one.

    Args:
        logits: The model's scores of the whole vocabulary, in any precision; the logarithms are
            taken in at least float32, a few rows at a time.
        reference: What the reference thinks; no gradient reaches it.
    """
    kl: Tensor = _MergedKL.apply(  # type: ignore[no-untyped-call]
        logits, reference.ids, reference.logprobs.detach(), reference.rest.detach()
    )
    return kl


def whole_kl(
    logits: Float[Tensor, "targets vocab"], reference: Float[Tensor, "targets vocab"]
) -> Float[Tensor, " targets"]:
    """``KL(reference || model)`` of each target over the whole vocabulary, as the report has it.

    Args:
        logits: The model's scores.
        reference: The reference's scores; no gradient reaches them.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    wanted = reference.detach().to(dtype).log_softmax(-1)
    return (wanted.exp() * (wanted - logits.to(dtype).log_softmax(-1))).sum(-1)


def consistency_loss(
    kl: Float[Tensor, " targets"],
    weights: Float[Tensor, " targets"],
    weight_sum: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """This batch's share of the step's loss: ``sum_i w_i kl_i / sum_j w_j``.

    Args:
        kl: Divergence of each target of this batch.
        weights: Weight of each target; ``1 / N`` of its response is the report's mean
            (`cascadevl.losses.next_token.sample_weights`, averaging ``sample``).
        weight_sum: Sum of the weights of the whole step, over all micro-batches and all ranks.
    """
    return torch.dot(kl, weights.to(kl.dtype)) / weight_sum


class _MergedKL(torch.autograd.Function):
    """Of logits (rows, vocabulary): keeps them as they came and two numbers a row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, logprobs: Tensor, rest: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        kl = logits.new_empty(len(logits), dtype=dtype)
        totals, others = torch.empty_like(kl), torch.empty_like(kl)  # logs of sums of exponentials
        for rows in blocks(logits):
            wide, place = _shifted(logits[rows], dtype), ids[rows].long()
            chosen = wide.gather(1, place)
            totals[rows] = total = wide.logsumexp(1)
            others[rows] = other = wide.scatter_(1, place, -torch.inf).logsumexp(1)
            wanted, left = logprobs[rows].to(dtype), rest[rows].to(dtype)
            kl[rows] = (wanted.exp() * (wanted - chosen + total[:, None])).sum(1)
            kl[rows] += left.exp() * (left - other + total)
        ctx.save_for_backward(logits, ids, logprobs, rest, totals, others)
        return kl

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, ids, logprobs, rest, totals, others = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in blocks(logits):
            wide, place = _shifted(logits[rows], totals.dtype), ids[rows].long()
            chosen = wide.gather(1, place)
            total, other = totals[rows, None], others[rows, None]
            left = rest[rows, None].to(wide.dtype)
            # q_j (1 - p_rest / q_rest), written so that a small q_rest divides nothing
            slope = (wide - total).exp_() - (wide - other + left).exp_()
            top = (chosen - total).exp() - logprobs[rows].to(wide.dtype).exp()
            result[rows] = slope.scatter_(1, place, top).mul_(grad[rows, None])
        return result, None, None, None


def _shifted(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A wide copy whose largest score is 0, where sums of exponentials are exact."""
    wide = logits.to(dtype, copy=True)
    return wide.sub_(wide.amax(1, keepdim=True))
