"""AdamW in pieces: gradients stay as they came, and are widened a cache's worth at a time.

The update of a large model is bound by memory, not by arithmetic. A float32 copy of all gradients,
a pass to scale them and a pass to round the masters into the model would move as many bytes again
as the update itself. Here a piece of gradient is widened and scaled in a small buffer, the piece of
the master is updated from it, and rounded into the model while it is still in the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

PIECE = 2**20
"""Entries that are updated at once: 16 MiB of master, gradient and both moments."""


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What one update of a parameter reads and writes.

    Attributes:
        master: The float32 weights.
        gradient: Their gradient in any type; None for zeros.
        weight: Where the new weights are rounded to; None if the master is the weight itself.
        scale: Factor of a gradient that is not float32 yet, as clipping wants it; None for 1.
    """

    master: nn.Parameter
    gradient: Tensor | None
    weight: Tensor | None
    scale: Tensor | None


class _Piece(NamedTuple):
    """Views of one stretch of an `Update` and of its moments, and a step count of its own."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    gradient: Tensor | None
    weight: Tensor | None
    scale: Tensor | None
    step: Tensor


class PiecewiseAdamW(torch.optim.AdamW):
    """torch's AdamW, its state and its arithmetic included, with an update that saves traffic."""

    @torch.no_grad()
    def update(self, updates: Iterable[Update]) -> None:
        """Update every parameter of the groups once; ``updates`` has one for each."""
        of = {id(update.master): update for update in updates}
        for group in self.param_groups:
            mine = [of[id(master)] for master in group["params"]]
            for pieces in _batches(piece for update in mine for piece in self._pieces(update)):
                _apply(pieces, group)
            for update in mine:
                self.state[update.master]["step"] += 1

    def _pieces(self, update: Update) -> Iterator[_Piece]:
        """The stretches of a parameter; one, whatever its size, if it is not contiguous."""
        master, state = update.master, self.state[update.master]
        if not state:  # as torch.optim.AdamW begins
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"] = torch.zeros_like(master, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(master, memory_format=torch.preserve_format)
        every = (master, state["exp_avg"], state["exp_avg_sq"], update.gradient, update.weight)
        in_one_piece = all(each is None or each.is_contiguous() for each in every)
        size = PIECE if in_one_piece else max(master.numel(), 1)
        for start in range(0, master.numel(), size):

            def part(whole: Tensor, first: int = start) -> Tensor:
                return whole.view(-1)[first : first + size] if in_one_piece else whole

            yield _Piece(
                master=part(master.detach()),
                exp_avg=part(state["exp_avg"]),
                exp_avg_sq=part(state["exp_avg_sq"]),
                gradient=None if update.gradient is None else part(update.gradient),
                weight=None if update.weight is None else part(update.weight),
                scale=update.scale,
                step=state["step"].clone(),
            )


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces joined up to `PIECE` entries: a call for each of many small ones would cost more."""
    batch: list[_Piece] = []
    entries = 0
    for piece in pieces:
        if batch and entries + piece.master.numel() > PIECE:
            yield batch
            batch, entries = [], 0
        batch.append(piece)
        entries += piece.master.numel()
    if batch:
        yield batch


def _widened(piece: _Piece) -> Tensor:
    """The gradient in float32 and scaled."""
    if piece.gradient is None:
        return torch.zeros_like(piece.master)
    wide = piece.gradient.to(torch.float32)
    if piece.scale is None:
        return wide
    assert wide is not piece.gradient, "float32 gradients are scaled before"
    return wide.mul_(piece.scale)


def _apply(pieces: list[_Piece], group: dict[str, Any]) -> None:
    """One call of torch's update."""
    beta1, beta2 = group["betas"]
    adamw(
        [piece.master for piece in pieces],
        [_widened(piece) for piece in pieces],
        [piece.exp_avg for piece in pieces],
        [piece.exp_avg_sq for piece in pieces],
        [],
        [piece.step for piece in pieces],
        fused=group["fused"],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    weights = [(p.weight, p.master) for p in pieces if p.weight is not None]
    if weights:
        torch._foreach_copy_([weight for weight, _ in weights], [master for _, master in weights])
