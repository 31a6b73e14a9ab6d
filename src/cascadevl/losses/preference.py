"""How much a pair of answers is preferred: the sigmoid loss of DPO, and others of the field.

All of them look at a pair through two numbers: by how many nats the model has made the chosen and
the rejected answer more likely than the reference did. MPO's preference term is ``sigmoid``; the
others are here so that they can be compared with it on the same rows, one line each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import logsigmoid

Preference: TypeAlias = Literal[
    "sigmoid",
    "sigmoid_norm",
    "smoothed",
    "robust",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogRatios:
    """``log pi(y|x) - log pi_0(y|x)`` of the two answers of some pairs, in nats.

    Attributes:
        chosen: Of the chosen answers, summed over their tokens.
        rejected: Of the rejected ones.
        chosen_lengths: Tokens of each chosen answer.
        rejected_lengths: Tokens of each rejected one.
    """

    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " pairs"]
    chosen_lengths: Int64[Tensor, " pairs"]
    rejected_lengths: Int64[Tensor, " pairs"]

    @property
    def margin(self) -> Float[Tensor, " pairs"]:
        """By how much the chosen answer gained on the rejected one."""
        return self.chosen - self.rejected

    @property
    def mean_margin(self) -> Float[Tensor, " pairs"]:
        """The same of each answer's mean over its tokens."""
        return self.chosen / self.chosen_lengths - self.rejected / self.rejected_lengths


Variant: TypeAlias = Callable[[LogRatios, float, float], Tensor]
"""From the log-ratios, beta and the label smoothing to one loss a pair."""

VARIANTS: dict[Preference, Variant] = {
    # DPO, arXiv 2305.18290, eq. 7; MPO's own (InternVL3 report, section 2.4)
    "sigmoid": lambda r, beta, _: -logsigmoid(beta * r.margin),
    # length-normalised DPO, arXiv 2411.15124, eq. 6
    "sigmoid_norm": lambda r, beta, _: -logsigmoid(beta * r.mean_margin),
    # conservative DPO: a share of the labels is the wrong way round (E. Mitchell's note on DPO)
    "smoothed": lambda r, beta, flipped: (
        -(1 - flipped) * logsigmoid(beta * r.margin) - flipped * logsigmoid(-beta * r.margin)
    ),
    # robust DPO, arXiv 2403.00409, eq. 12: the same without the bias of that share
    "robust": lambda r, beta, flipped: (
        (-(1 - flipped) * logsigmoid(beta * r.margin) + flipped * logsigmoid(-beta * r.margin))
        / (1 - 2 * flipped)
    ),
    # SLiC and RSO, arXiv 2309.06657, section 3
    "hinge": lambda r, beta, _: torch.relu(1 - beta * r.margin),
    # IPO, arXiv 2310.12036, eq. 17, of means over tokens as its authors advise
    "ipo": lambda r, beta, _: (r.mean_margin - 1 / (2 * beta)) ** 2,
    # EXO, arXiv 2402.00856, eq. 16: needs a label smoothing above 0
    "exo_pair": lambda r, beta, flipped: _exo(beta * r.margin, flipped),
    # NCA, arXiv 2402.05369, for two answers
    "nca_pair": lambda r, beta, _: (
        -logsigmoid(beta * r.chosen)
        - 0.5 * logsigmoid(-beta * r.chosen)
        - 0.5 * logsigmoid(-beta * r.rejected)
    ),
    # SPPO, arXiv 2405.00675, eq. 4.7 with certain labels
    "sppo_hard": lambda r, beta, _: (r.chosen - 0.5 / beta) ** 2 + (r.rejected + 0.5 / beta) ** 2,
    # APO, arXiv 2408.06266, eq. 7: the chosen answer is better than what the model would say
    "apo_zero": lambda r, beta, _: (
        1 - torch.sigmoid(beta * r.chosen) + torch.sigmoid(beta * r.rejected)
    ),
    # APO, eq. 8: it is worse, yet better than the rejected one
    "apo_down": lambda r, beta, _: (
        torch.sigmoid(beta * r.chosen) + 1 - torch.sigmoid(beta * r.margin)
    ),
}


def preference_loss(
    ratios: LogRatios,
    *,
    beta: float,
    preference: Preference = "sigmoid",
    label_smoothing: float = 0.0,
) -> Float[Tensor, " pairs"]:
    """Loss of each pair: small where the chosen answer gained on the rejected one.

    Args:
        ratios: What the model made of both answers.
        beta: How strongly the model is held to the reference.
        preference: Which loss, a key of `VARIANTS`.
        label_smoothing: Share of pairs whose labels are taken to be the wrong way round; read by
            ``smoothed``, ``robust`` (below 0.5) and ``exo_pair`` (above 0).
    """
    return VARIANTS[preference](ratios, beta, label_smoothing)


def _exo(scaled: Float[Tensor, " pairs"], flipped: float) -> Float[Tensor, " pairs"]:
    """``KL(model's preference || smoothed labels)`` of two answers."""
    labels = scaled.new_tensor([1 - flipped, flipped]).log()
    return torch.sigmoid(scaled) * (logsigmoid(scaled) - labels[0]) + torch.sigmoid(-scaled) * (
        logsigmoid(-scaled) - labels[1]
    )
