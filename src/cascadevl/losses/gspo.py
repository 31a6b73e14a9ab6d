"""Group sequence policy optimisation: answers better than their group's become more likely.

GSPO (arXiv 2507.18071) and the InternVL3.5 report, section on Cascade RL, second stage. For the
answers y_i to one question, with rewards r_i:

    A_i = (r_i - mean(r)) / std(r)
    s_i = exp(1 / |y_i| * sum_t log(pi(y_it) / pi_old(y_it)))
    J = mean over i of min(s_i * A_i, clip(s_i, 1 - clip_low, 1 + clip_high) * A_i)

The report prints J as a loss; it is to be maximised, so the loss here is -J. There is no reference
model. `grpo_loss` is the form in which every token has a ratio of its own (DeepSeekMath, arXiv
2402.03300), for comparison.

Answers lie one behind the other, a number a token, as packed rows give them. The mean is over all
answers of the step, also those of groups that need no forward pass because their rewards are equal
(docs/decisions/0023); a pure function cannot see them, so the caller passes their number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from cascadevl.losses.logprobs import sample_sums

ADVANTAGE_EPS = 1e-6
"""Added to the deviation of a group's rewards (public code of InternVL3.5's training)."""


@dataclass(frozen=True, slots=True, eq=False)
class PolicyTerms:
    """A micro-batch's share of the loss, and what became of its answers.

    Attributes:
        loss: The share; the shares of a step add up to its loss.
        ratios: How much more likely each answer has become; of tokens, their mean. No gradient.
        clipped: 1 for an answer that gets no gradient because it has moved far enough, else 0; of
            tokens, the share of them. No gradient.
    """

    loss: Float[Tensor, ""]
    ratios: Float[Tensor, " answers"]
    clipped: Float[Tensor, " answers"]


def group_advantages(
    rewards: Float64[Tensor, "groups answers"],
    *,
    unbiased: bool = False,
    eps: float = ADVANTAGE_EPS,
) -> Float64[Tensor, "groups answers"]:
    """How much better each answer is than its group, in deviations of the group.

    Equal rewards give exactly 0: nothing is to be learned from such a group.

    Args:
        rewards: Rewards of the answers to each question; float64, because eps is small.
        unbiased: Divide the sum of squares by one less than the group, as the public code does,
            and not by the group (docs/decisions/0023).
        eps: Added to the deviation.

    Raises:
        ValueError: If a group has fewer than two answers, which cannot be compared.
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"a group of {rewards.shape[1]} has nothing to be compared with")
    centred = rewards - rewards.mean(-1, keepdim=True)
    deviation = rewards.std(-1, keepdim=True, correction=int(unbiased))
    is_flat = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    return (centred / (deviation + eps)).masked_fill(is_flat, 0.0)


def gspo_loss(
    logprobs: Float[Tensor, " tokens"],
    old_logprobs: Float[Tensor, " tokens"],
    answer: Int64[Tensor, " tokens"],
    advantages: Float[Tensor, " answers"],
    *,
    clip_low: float,
    clip_high: float,
    num_answers: int,
) -> PolicyTerms:
    """The loss in which a whole answer has one ratio, whatever its length.

    Args:
        logprobs: Of every token of the answers, under the model in training.
        old_logprobs: The same before the first update on these answers; no gradient reaches them.
        answer: Which answer each token belongs to; every answer has tokens.
        advantages: Of each answer (`group_advantages`).
        clip_low: The ratio counts down to ``1 - clip_low`` (GSPO paper: 3e-4).
        clip_high: The ratio counts up to ``1 + clip_high`` (GSPO paper: 4e-4).
        num_answers: Answers of the whole step.
    """
    log_ratios = _answer_means(logprobs - old_logprobs.detach(), answer, len(advantages))
    ratios = log_ratios.exp()
    objective, clipped = _clipped(ratios, advantages.detach(), clip_low, clip_high)
    return PolicyTerms(-objective.sum() / num_answers, ratios.detach(), clipped)


def grpo_loss(
    logprobs: Float[Tensor, " tokens"],
    old_logprobs: Float[Tensor, " tokens"],
    answer: Int64[Tensor, " tokens"],
    advantages: Float[Tensor, " answers"],
    *,
    clip_low: float,
    clip_high: float,
    num_answers: int,
) -> PolicyTerms:
    """The loss in which every token has a ratio of its own, averaged over an answer's tokens.

    Args:
        logprobs: See `gspo_loss`, as for all others.
        old_logprobs: See `gspo_loss`.
        answer: See `gspo_loss`.
        advantages: See `gspo_loss`.
        clip_low: See `gspo_loss`; usual are 0.2.
        clip_high: See `gspo_loss`.
        num_answers: See `gspo_loss`.
    """
    ratios = (logprobs - old_logprobs.detach()).exp()
    objective, clipped = _clipped(ratios, advantages.detach()[answer], clip_low, clip_high)
    mean_objective, mean_ratio, share_clipped = (
        _answer_means(values, answer, len(advantages))
        for values in (objective, ratios.detach(), clipped)
    )
    return PolicyTerms(-mean_objective.sum() / num_answers, mean_ratio, share_clipped)


def _clipped(
    ratios: Float[Tensor, " n"], advantages: Float[Tensor, " n"], low: float, high: float
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The lower of the two objectives, and 1 where it is the clipped one, which has no gradient."""
    advantages = advantages.to(ratios.dtype)
    free = ratios * advantages
    bounded = ratios.clamp(1 - low, 1 + high) * advantages
    return torch.minimum(free, bounded), (bounded < free).to(ratios.dtype).detach()


def _answer_means(
    values: Float[Tensor, " tokens"], answer: Int64[Tensor, " tokens"], num_answers: int
) -> Float[Tensor, " answers"]:
    """Mean over the tokens of each answer."""
    lengths = torch.bincount(answer, minlength=num_answers)
    return sample_sums(values, answer, num_answers) / lengths
