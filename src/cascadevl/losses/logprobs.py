"""What the model thinks of each token: the one place where logits become log-probabilities.

Every loss of the package starts here, so that all of them take the logarithm in the same
precision: a bfloat16 log-softmax loses the tail that the ratios of MPO and GSPO live on.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def token_logprobs(
    logits: Float[Tensor, "*tokens vocab"], ids: Int64[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """Log-probability of each given token, in float32 whatever the logits came in.

    Args:
        logits: Scores of the whole vocabulary at the positions that predict the tokens.
        ids: The tokens that were to be predicted; the caller has already shifted them.

    Returns:
        ``log p(id)`` for each token; float32, or float64 for float64 logits.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.log_softmax(-1, dtype=dtype).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
