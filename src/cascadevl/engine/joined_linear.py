"""Linear layers that read the same input, computed as one: queries, keys and values; gate and up.

A decode step is hundreds of small products, and each costs a call and a meeting of the threads
whatever its size. The modules of transformers stay as they are: the first layer of a set computes
all of them, the others hand out their part of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

SETS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that transformers' bodies apply to the same input, in their order."""


@runtime_checkable
class Whole(Protocol):
    """The layer that computes a set: packed, or in int8."""

    @property
    def num_bytes(self) -> int:
        """Its memory."""

    def load(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take other weights."""

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it."""


class _Joined:
    """A set's layer, and its last result while parts of that are still to be handed out."""

    def __init__(self, layer: Whole, sizes: list[int]) -> None:
        self.layer, self.sizes = layer, sizes
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()
        self._new: dict[int, tuple[Tensor, Tensor | None]] = {}

    def part(self, x: Tensor, place: int) -> Tensor:
        if x is not self._input:
            self._input, self._parts = x, self.layer(x).split(self.sizes, -1)
        part = self._parts[place]
        if place == len(self.sizes) - 1:
            self._input, self._parts = None, ()
        return part

    def load(self, place: int, weight: Tensor, bias: Tensor | None) -> None:
        self._new[place] = (weight, bias)
        if len(self._new) == len(self.sizes):
            new = [self._new[number] for number in range(len(self.sizes))]
            self._new = {}
            self.layer.load(*_stacked(new))


class PartOfJoined(nn.Module):
    """One layer of a set that is computed together."""

    def __init__(self, joined: _Joined, place: int, in_features: int, *, has_bias: bool) -> None:
        """Stand for the layer at a place of the set."""
        super().__init__()
        self._joined, self._place = joined, place
        self.in_features, self.out_features = in_features, joined.sizes[place]
        self.has_bias = has_bias

    @property
    def num_bytes(self) -> int:
        """Its share of the set's memory."""
        return self._joined.layer.num_bytes * self.out_features // sum(self._joined.sizes)

    def load(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        """Take other weights of the same shape; used once the whole set has them."""
        self._joined.load(self._place, weight, bias)

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """Apply the layer; the others of the set are expected to be asked with the same tensor."""
        return self._joined.part(x, self._place)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, joined"


def join(
    linears: Sequence[nn.Linear], make: Callable[[Tensor, Tensor | None], Whole]
) -> list[PartOfJoined]:
    """Make layers that are computed as one.

    Args:
        linears: Layers of the same input; all have a bias, or none has.
        make: Makes the layer that computes all of them, of a weight and a bias.
    """
    weight, bias = _stacked([(linear.weight, linear.bias) for linear in linears])
    joined = _Joined(make(weight, bias), [linear.out_features for linear in linears])
    return [
        PartOfJoined(joined, place, linear.in_features, has_bias=bias is not None)
        for place, linear in enumerate(linears)
    ]


def sets_of(linears: dict[str, nn.Linear]) -> list[tuple[str, ...]]:
    """The names of all layers, those that are computed together side by side."""
    found: list[tuple[str, ...]] = []
    taken: set[str] = set()
    for name, linear in linears.items():
        if name in taken:
            continue
        owner, _, leaf = name.rpartition(".")
        names = next((tuple(f"{owner}.{n}" for n in each) for each in SETS if leaf == each[0]), ())
        others = [linears.get(other) for other in names]
        alike = bool(others) and all(
            other is not None
            and (other.bias is None) == (linear.bias is None)
            and other.in_features == linear.in_features
            for other in others
        )
        found.append(names if alike else (name,))
        taken.update(found[-1])
    return found


def _stacked(
    layers: Sequence[tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor | None]:
    biases = [bias.detach() for _, bias in layers if bias is not None]
    weight = torch.cat([weight.detach() for weight, _ in layers])
    return weight, torch.cat(biases) if biases else None
