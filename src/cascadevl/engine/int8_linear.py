"""Linear layers with int8 weights: half the bytes of bfloat16 to read for every token.

Every output channel has a scale, activations stay bfloat16, sums are float32. Few rows, as in
decoding, go through torch's kernel that widens the weights in registers; many rows, as in a
prefill, through a matrix product on weights that are widened block by block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float, Int8
from torch import Tensor, nn
from torch.nn import functional as F

from cascadevl.errors import CheckpointError

LEVELS = 127
"""Largest absolute value of a quantised weight."""

_QUANTISED_BYTES = 32 * 2**20
"""Float32 weights that are quantised at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Table:
    """Which kernel serves how many rows: fixed numbers, never timed at run time.

    benchmarks/bench_linear.py finds them.

    Attributes:
        kernel_rows: Up to this many rows the int8 kernel is faster than widening the weights.
        block_bytes: Weights that are widened to bfloat16 at once; bounds the memory, and keeps
            the block in the cache until the product has read it.
    """

    kernel_rows: int = 24
    block_bytes: int = 8 * 2**20


TABLE = Int8Table()


def quantise(
    weight: Float[Tensor, "out in"],
) -> tuple[Int8[Tensor, "out in"], BFloat16[Tensor, " out"]]:
    """Round a weight to int8 with one scale an output channel.

    The scale is rounded to bfloat16 first, as the kernel wants it, and the weight is divided by
    the rounded one, so that ``int8 * scale`` is within half a step of the weight.

    Raises:
        CheckpointError: If a weight is infinite or not a number.
    """
    largest = weight.detach().abs().amax(1)
    if not bool(torch.isfinite(largest).all()):
        row = int((~torch.isfinite(largest)).nonzero()[0])
        raise CheckpointError(
            f"row {row} of a weight of shape {tuple(weight.shape)} is not finite and cannot be "
            f"quantised; look for the step at which training diverged"
        )
    scale = (largest.float() / LEVELS).to(torch.bfloat16)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a channel of zeros
    steps = (weight.detach().float() / scale.float()[:, None]).round_()
    return steps.clamp_(-LEVELS, LEVELS).to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer for inference on a CPU, its weight in int8.

    Its output has the type of its input; inside, activations are bfloat16 whatever they come in.
    """

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        *,
        table: Int8Table = TABLE,
    ) -> None:
        """Quantise a weight.

        Args:
            weight: The weight of an `nn.Linear`; it is only read.
            bias: Its bias, copied in bfloat16; or None.
            table: Numbers of rows at which the computation changes.

        Raises:
            CheckpointError: If a weight is infinite or not a number.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.table = table
        self._weight = torch.empty(weight.shape, dtype=torch.int8)
        self._scale = torch.empty(self.out_features, dtype=torch.bfloat16)
        self.bias = None if bias is None else torch.empty_like(bias, dtype=torch.bfloat16)
        # The kernel reads 16 numbers at a time and, where the last ones are fewer, what lies
        # behind them: torch does not check that.
        self._kernel_fits = self.in_features % 16 == 0
        self.load(weight, bias)

    @property
    def has_bias(self) -> bool:
        """Whether it has a bias."""
        return self.bias is not None

    def load(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        """Take other weights of the same shape, in place and a block at a time.

        Raises:
            CheckpointError: If a weight is infinite or not a number.
        """
        step = max(1, _QUANTISED_BYTES // (4 * self.in_features))
        for start in range(0, self.out_features, step):
            block = slice(start, start + step)
            self._weight[block], self._scale[block] = quantise(weight[block])
        if self.bias is not None:
            assert bias is not None, "the layer was made with a bias"
            self.bias.copy_(bias.detach())

    @property
    def num_bytes(self) -> int:
        """Memory of the weight, its scales and the bias."""
        tensors = [self._weight, self._scale, *([] if self.bias is None else [self.bias])]
        return sum(tensor.nbytes for tensor in tensors)

    def dequantised(self) -> Float[Tensor, "out in"]:
        """The weight that the layer really applies, in float32."""
        return self._weight.float() * self._scale.float()[:, None]

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """Apply the layer.

        Raises:
            ValueError: If a gradient is wanted.
        """
        refuse_gradient(x)
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
        if self._kernel_fits and len(rows) <= self.table.kernel_rows:
            if rows.data_ptr() % 32:  # a view into the middle of something: the kernel would crash
                rows = rows.clone()
            out: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self._weight, self._scale)
        else:
            out = self._widened(rows)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _widened(self, rows: BFloat16[Tensor, "rows in"]) -> BFloat16[Tensor, "rows out"]:
        """The same for many rows: every int8 is a bfloat16, so only the scale rounds."""
        step = max(1, self.table.block_bytes // (2 * self.in_features))
        pieces = [
            F.linear(rows, self._weight[start : start + step].to(torch.bfloat16))
            for start in range(0, self.out_features, step)
        ]
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return out.mul_(self._scale)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"


def refuse_gradient(x: Tensor) -> None:
    """Raise where a gradient is wanted of a layer that has none.

    Raises:
        ValueError: If ``x`` requires a gradient and gradients are on.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "packed layers have no gradient; run the engine's model under torch.inference_mode(), "
            "and train the model it was packed from"
        )
