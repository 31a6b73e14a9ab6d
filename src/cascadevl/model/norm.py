"""Root-mean-square normalisation with a backward pass of its own.

What transformers computes, bit for bit forward; but autograd would keep the input and its result in
float32. Here the input is kept as it came, with one number a token: half the memory. The time is
about the same (benchmarks/bench_parts.py). It takes its place in the bodies through
`torch.nn.Module.set_submodule`, under the same parameter name.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

SAME_FORMULA = frozenset(
    ("InternVLVisionRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Qwen3MoeRMSNorm", "LlamaRMSNorm")
)
"""transformers' classes that compute ``weight * (x / rms(x)).to(dtype)``; GPT-OSS rounds later."""


def _normalise(states: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = states.to(torch.float32)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(states.dtype), scale


class _Normalise(torch.autograd.Function):
    """``weight * (states * scale)`` with ``scale = 1 / sqrt(mean(states**2) + eps)``."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _normalise(states, weight, eps)
        ctx.save_for_backward(states, weight, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        states, weight, scale = ctx.saved_tensors
        normed = states.to(torch.float32) * scale
        states_grad, weight_grad = None, None
        if ctx.needs_input_grad[1]:
            product = grad * normed.to(states.dtype)
            weight_grad = product.flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            inner = (grad * weight).to(torch.float32)
            along = torch.linalg.vecdot(inner, normed).unsqueeze(-1).div_(states.shape[-1])
            inner = torch.addcmul(inner, normed, along, value=-1)
            states_grad = inner.mul_(scale).to(states.dtype)
        return states_grad, weight_grad, None


class LeanRMSNorm(nn.Module):
    """A normalisation of transformers' bodies; the name's end is what transformers goes by."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        """Take over the weight of the module that is replaced."""
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(
        self, hidden_states: Float[Tensor, "*tokens width"]
    ) -> Float[Tensor, "*tokens width"]:
        """Normalise over the last axis."""
        if not torch.is_grad_enabled():  # decoding is many small calls: this one costs half
            return _normalise(hidden_states, self.weight, self.variance_epsilon)[0]
        normed: Tensor = _Normalise.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        return normed

    def extra_repr(self) -> str:
        """What `print` shows, as transformers' own."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def use_lean_norms(body: nn.Module) -> None:
    """Replace the normalisations of a body that compute this formula."""
    for name, module in list(body.named_modules()):
        if type(module).__name__ in SAME_FORMULA:
            lean = LeanRMSNorm(module.weight, float(module.variance_epsilon))  # type: ignore[arg-type]
            body.set_submodule(name, lean)
