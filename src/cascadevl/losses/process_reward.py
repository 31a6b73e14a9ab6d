"""The loss of a process reward model: is the solution right up to this step, "+" or "-"?

InternVL3 report, section 2.5, and VisualPRM (arXiv 2503.10291): ``c_i ~ M(y_i | I, q, s_<=i)`` with
``c_i`` in {+, -}, and every step of a solution is supervised. Released models are trained as in
SFT, by the cross-entropy over the whole vocabulary; scored are they by the softmax over the two
tokens alone, which can be trained as well (docs/decisions/0027).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from cascadevl.losses.logprobs import token_logprobs

LossForm: TypeAlias = Literal["vocabulary", "two_tokens"]
"""Over which tokens the probability of a label is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelTokens:
    """The two tokens that answer.

    Attributes:
        plus: Id of "+".
        minus: Id of "-".
    """

    plus: int
    minus: int


def plus_logits(
    logits: Float[Tensor, "steps vocab"], tokens: LabelTokens
) -> Float[Tensor, " steps"]:
    """How much "+" is preferred to "-": the logit of P("+") among the two.

    Args:
        logits: Scores of the whole vocabulary where the answer to each step is predicted.
        tokens: The two tokens.

    Returns:
        In float32, or float64 for float64 logits.
    """
    pair = logits[:, [tokens.plus, tokens.minus]]
    wide = pair.to(torch.promote_types(pair.dtype, torch.float32))
    return wide[:, 0] - wide[:, 1]


def plus_probability(
    logits: Float[Tensor, "steps vocab"], tokens: LabelTokens
) -> Float[Tensor, " steps"]:
    """P("+") of each step by the softmax over the two tokens: the step's score.

    Args:
        logits: Scores of the whole vocabulary where the answer to each step is predicted.
        tokens: The two tokens.
    """
    return plus_logits(logits, tokens).sigmoid()


def label_nll(
    logits: Float[Tensor, "steps vocab"],
    is_plus: Bool[Tensor, " steps"],
    *,
    tokens: LabelTokens,
    form: LossForm,
) -> Float[Tensor, " steps"]:
    """Negative log-likelihood of each step's label.

    Args:
        logits: Scores of the whole vocabulary where the answer to each step is predicted.
        is_plus: Whether the step is labelled right.
        tokens: The two tokens.
        form: ``vocabulary`` as released, or ``two_tokens``.
    """
    if form == "vocabulary":
        ids = torch.where(is_plus, tokens.plus, tokens.minus)
        return -token_logprobs(logits, ids)
    preferred = plus_logits(logits, tokens)
    return -logsigmoid(torch.where(is_plus, preferred, -preferred))


def label_weights(
    weights: Float[Tensor, " steps"], is_plus: Bool[Tensor, " steps"], minus_weight: float
) -> Float[Tensor, " steps"]:
    """Weights of the steps, those labelled wrong counting ``minus_weight`` times.

    Args:
        weights: By the length of each step's solution (`losses.next_token.sample_weights`).
        is_plus: Whether the step is labelled right.
        minus_weight: About one step in ten is wrong in the released data, which weigh all alike.
    """
    return torch.where(is_plus, weights, weights * minus_weight)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProcessRewardTerms:
    """One batch's shares of what a step of training comes to; the shares of its batches add up.

    Attributes:
        loss: Weighted mean of the negative log-likelihoods, the only one with a gradient.
        accuracy: Weighted share of steps whose label has more than half of the probability.
        minus_share: Weighted share of steps that are labelled wrong.
        minus_found: Weighted share of steps that are labelled wrong and taken for it.
    """

    loss: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]
    minus_share: Float[Tensor, ""]
    minus_found: Float[Tensor, ""]


def process_reward_loss(
    nll: Float[Tensor, " steps"],
    is_plus: Bool[Tensor, " steps"],
    weights: Float[Tensor, " steps"],
    weight_sum: float | Float[Tensor, ""],
) -> ProcessRewardTerms:
    """This batch's share of the step's loss: ``sum_i w_i nll_i / sum_j w_j``.

    Args:
        nll: Of each step's label (`label_nll`).
        is_plus: Whether the step is labelled right.
        weights: Of the steps (`label_weights`).
        weight_sum: Sum of the weights of the whole step of training, over all micro-batches and
            all ranks.
    """
    shares = weights.to(nll.dtype) / weight_sum
    is_found = nll.detach() < math.log(2)
    return ProcessRewardTerms(
        loss=torch.dot(nll, shares),
        accuracy=(shares * is_found).sum(),
        minus_share=(shares * ~is_plus).sum(),
        minus_found=(shares * (is_found & ~is_plus)).sum(),
    )
