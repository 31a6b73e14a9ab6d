"""What a step of ViCO's first stage minimises, and what it tells of full and compressed tiles."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cascadevl.data.consistency import VIEWS, ConsistencyBatch
from cascadevl.losses.logprobs import sample_sums
from cascadevl.losses.vico import consistency_loss, merged_kl
from cascadevl.train.objective import Objective, Terms
from cascadevl.train.vico_reference import Asking


def consistency_objective(ask: Asking | None = None) -> Objective[ConsistencyBatch]:
    """The divergence of the model from its reference, over the tokens of responses.

    Args:
        ask: How the reference is asked; None where batches bring what it thinks.
    """

    def loss(model: nn.Module, batch: ConsistencyBatch, weight_sum: float) -> Terms:
        reference = batch.reference
        if reference is None:
            assert ask is not None, "a batch brings what the reference thinks, or rows to ask about"
            assert batch.full is not None, "the same"
            reference = ask(batch.full)
        same = torch.zeros(len(reference), dtype=torch.bool, device=reference.ids.device)

        def head(logits: Float[Tensor, "chunk vocab"], where: slice) -> Float[Tensor, " chunk"]:
            own = reference.at(where)
            same[where] = logits.detach().argmax(-1) == own.ids[:, 0]
            return merged_kl(logits, own)

        kl = model(batch=batch.packed, head_fn=head)
        shares = batch.packed.target_weights / weight_sum
        metrics = _sums(batch, kl.detach(), same, shares)
        metrics["outside_top"] = torch.dot(shares, reference.rest.float().exp())
        weights = batch.packed.target_weights
        return Terms(consistency_loss(kl, weights, weight_sum), metrics)

    return Objective(weigh=_target_weight, loss=loss, recorded=by_view)


def by_view(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over the targets of each view, of sums over all targets of a step.

    Args:
        sums: For each view the ``share`` of its targets by weight, and divergence (``kl``) and
            agreement (``same``) multiplied with it; anything else stays as it is.

    Returns:
        ``share_VIEW``, ``kl_VIEW`` and ``same_VIEW`` of the views that occurred, and the rest.
    """
    views = {f"{name}_{view}" for name in ("share", "kl", "same") for view in VIEWS}
    found = {name: value for name, value in sums.items() if name not in views}
    for view in VIEWS:
        share = sums[f"share_{view}"]
        if share > 0:
            found[f"share_{view}"] = share
            found[f"kl_{view}"] = sums[f"kl_{view}"] / share
            found[f"same_{view}"] = sums[f"same_{view}"] / share
    return found


def _target_weight(batch: ConsistencyBatch) -> float:
    return float(batch.packed.target_weights.sum(dtype=torch.float64))


def _sums(
    batch: ConsistencyBatch,
    kl: Float[Tensor, " targets"],
    same: Bool[Tensor, " targets"],
    shares: Float[Tensor, " targets"],
) -> dict[str, Tensor]:
    """Weighted sums over the targets of each view."""
    columns = {"share": shares, "kl": shares * kl, "same": shares * same}
    return {
        f"{name}_{view}": value
        for name, column in columns.items()
        for view, value in zip(
            VIEWS, sample_sums(column, batch.views, len(VIEWS)).unbind(), strict=True
        )
    }
