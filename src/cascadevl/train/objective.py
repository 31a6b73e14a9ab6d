"""What a step minimises: how a batch's share of the loss is computed and what it weighs.

The loop knows neither tokens nor pairs nor groups. It sums the weights of all micro-batches of a
step over all ranks first, and hands that one number to the loss of each micro-batch, so that
every averaging is normalised once, globally (docs/decisions/0002).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cascadevl.losses.next_token import next_token_loss, token_nll
from cascadevl.types import Batch

SelfT = TypeVar("SelfT")


@runtime_checkable
class MicroBatch(Protocol):
    """What the loop asks of a batch, whatever the stage."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Where its samples came from, for errors."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""

    @property
    def num_tiles(self) -> int:
        """Tiles of all images."""

    def to(self: SelfT, device: torch.device | str) -> SelfT:
        """The same batch on another device."""


BatchT = TypeVar("BatchT", bound=MicroBatch)


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """One micro-batch's share of a step's loss.

    Attributes:
        loss: The share; the shares of a step add up to its loss.
        metrics: Shares of other values worth recording; they are added up likewise.
    """

    loss: Float[Tensor, ""]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


def as_they_are(sums: Mapping[str, float]) -> dict[str, float]:
    """The values of a step as they were added up."""
    return dict(sums)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective(Generic[BatchT]):
    """A loss and its normaliser.

    Attributes:
        weigh: What a batch weighs in the step: the sum of its target weights, its number of
            pairs. Called on the host, before the batch moves to the device.
        loss: The batch's share, given the model, the batch and the weight of the whole step.
        recorded: From the other values of a step, each added up over all its batches and
            processes, to those worth recording: the place for means whose number is not the
            weight of the step.
    """

    weigh: Callable[[BatchT], float]
    loss: Callable[[nn.Module, BatchT, float], Terms]
    recorded: Callable[[Mapping[str, float]], Mapping[str, float]] = as_they_are


@runtime_checkable
class Memory(Protocol):
    """What an objective remembers from step to step: part of a run's state, equal on all ranks."""

    def advance(self, metrics: Mapping[str, float]) -> None:
        """Take in the values of a step that has been applied, those of all processes together."""

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, as plain JSON values."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Remember what was remembered when a state was taken."""


def _target_weight(batch: Batch) -> float:
    return float(batch.target_weights.sum(dtype=torch.float64))


def _next_token(model: nn.Module, batch: Batch, weight_sum: float) -> Terms:
    """Weighted negative log-likelihood of the targets (InternVL3 report, section 2.2)."""

    def head(logits: Float[Tensor, "chunk vocab"], where: slice) -> Float[Tensor, " chunk"]:
        return token_nll(logits, batch.target_ids[where])

    nll = model(batch=batch, head_fn=head)
    return Terms(next_token_loss(nll, batch.target_weights, weight_sum))


NEXT_TOKEN: Objective[Batch] = Objective(weigh=_target_weight, loss=_next_token)
"""The objective of pre-training and of SFT."""
