"""Log-probabilities of whole answers in packed rows: what policies and references are compared by.

Whoever calls this wants the same number twice for the same weights, so nothing may be dropped at
random meanwhile: recipes hold `CascadeVLForConditionalGeneration.no_drop_path` open.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cascadevl.losses.logprobs import sample_sums, token_logprobs
from cascadevl.types import Batch


def answer_logprobs(model: nn.Module, batch: Batch) -> Float[Tensor, " samples"]:
    """``log p(y|x)`` of every sample of packed rows, summed over its targets; float32.

    Args:
        model: The model.
        batch: The rows; a sample without targets gets 0.
    """

    def head(logits: Float[Tensor, "chunk vocab"], where: slice) -> Float[Tensor, " chunk"]:
        return token_logprobs(logits, batch.target_ids[where])

    each = model(batch=batch, head_fn=head)
    return sample_sums(each, batch.target_samples, len(batch.sources))


def answer_lengths(batch: Batch) -> Int64[Tensor, " samples"]:
    """Targets of every sample: the report's |y|, the end of the turn counted."""
    return torch.bincount(batch.target_samples, minlength=len(batch.sources))
