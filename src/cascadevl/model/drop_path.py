"""Drop path for the vision tower, which transformers' InternViT does not have.

Stochastic depth (arXiv 1603.09382): in training a whole residual branch of a tile is left out with
a probability that rises linearly with depth, and scaled up otherwise so that its mean stays. The
released recipes use up to 0.4. It sits in forward hooks on the branches, torch's documented
extension point, before the layer scale, which commutes with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def drop_branch(
    branch: Float[Tensor, "tiles tokens channels"], rate: float
) -> Float[Tensor, "tiles tokens channels"]:
    """Zero the branch of each tile with probability ``rate``, divide the others by ``1 - rate``."""
    keep = torch.rand(len(branch), 1, 1, device=branch.device) >= rate
    return branch * (keep / (1 - rate)).to(branch.dtype)


class DropPath:
    """The drop path of one vision tower; works only while the tower is in training mode.

    It draws from torch's default generator of the device, as dropout does, so that checkpointed
    layers draw the same again and a run's seed covers it.
    """

    def __init__(self, layers: nn.ModuleList, rate: float) -> None:
        """Hook both branches (``attention`` and ``mlp``) of every layer.

        Args:
            layers: The tower's layers in order.
            rate: Rate of the last layer; the first has 0.
        """
        self.rates = [rate * depth / max(len(layers) - 1, 1) for depth in range(len(layers))]
        self.paused = 0
        for layer, layer_rate in zip(layers, self.rates, strict=True):
            if layer_rate > 0:
                for name in ("attention", "mlp"):
                    layer.get_submodule(name).register_forward_hook(_Hook(self, layer_rate))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Drop nothing inside, as log-probabilities need it."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1


class _Hook:
    """Forward hook of one branch; a class, so that a model that has it can be copied."""

    def __init__(self, owner: DropPath, rate: float) -> None:
        self.owner, self.rate = owner, rate

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not module.training or self.owner.paused:
            return output
        if isinstance(output, tuple):  # attention also returns its weights
            return (drop_branch(output[0], self.rate), *output[1:])
        return drop_branch(output, self.rate)


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Let no dropout layer of a model drop anything inside, in training mode too."""
    rates = [(m, m.p) for m in model.modules() if isinstance(m, nn.Dropout)]
    try:
        for dropout, _ in rates:
            dropout.p = 0.0
        yield
    finally:
        for dropout, rate in rates:
            dropout.p = rate
