"""The text-only next-token loss of native pre-training and SFT, with its three averagings.

InternVL3 report, section 2.2: ``L = -sum_i w_i log p(x_i | x_<i)`` over text tokens only, with
``w_i = 1 / l**0`` (token), ``1 / l**0.5`` (square, the one used) or ``1 / l`` (sample), l being
the number of loss tokens of the sample; InternVL2.5 divides by the sum of the weights. That
sum belongs to the whole global step (docs/decisions/0002), which a pure function cannot see:
the caller passes it.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cascadevl.losses.logprobs import token_logprobs

Averaging: TypeAlias = Literal["token", "square", "sample"]

LENGTH_EXPONENTS: dict[Averaging, float] = {"token": 0.0, "square": 0.5, "sample": 1.0}
"""How strongly a sample's number of loss tokens lowers the weight of each of them."""


def sample_weights(
    num_targets: Int64[Tensor, " samples"], averaging: Averaging
) -> Float[Tensor, " samples"]:
    """Weight w of every loss token of a sample (InternVL3 report, section 2.2).

    Args:
        num_targets: Loss tokens of each sample, the report's l.
        averaging: ``token`` favours long answers, ``sample`` short ones, ``square`` neither.

    Returns:
        Float32 weights; 0 for a sample without loss tokens, which has nothing to weigh.
    """
    lengths = num_targets.double()
    weights = lengths.clamp(min=1.0) ** -LENGTH_EXPONENTS[averaging]
    return (weights * (lengths > 0)).float()


def token_nll(
    logits: Float[Tensor, "targets vocab"], ids: Int64[Tensor, " targets"]
) -> Float[Tensor, " targets"]:
    """Negative log-likelihood of each target token, in float32 (not weighted, not averaged).

    Args:
        logits: Scores at the positions that predict the targets.
        ids: The target tokens.
    """
    return -token_logprobs(logits, ids)


def next_token_loss(
    nll: Float[Tensor, " targets"],
    weights: Float[Tensor, " targets"],
    weight_sum: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """This batch's share of the step's loss: ``sum_i w_i nll_i / sum_j w_j``.

    Args:
        nll: Negative log-likelihood of each target of this batch.
        weights: Weight of each target (`sample_weights`).
        weight_sum: Sum of the weights of the whole step, over all micro-batches and all ranks.
            The shares of the micro-batches add up to the loss of the step, gradients included.
    """
    return torch.dot(nll, weights.to(nll.dtype)) / weight_sum
