"""The lean normalisation against transformers' own, value and gradient."""

from __future__ import annotations

import pytest
import torch
from tests.model.bodies import BODIES, body_model
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from cascadevl.model.norm import SAME_FORMULA, LeanRMSNorm, use_lean_norms


def passes(norm: nn.Module, states: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Result and both gradients."""
    states = states.clone().requires_grad_()
    norm.weight.grad = None
    out = norm(states)
    out.backward(grad)
    return out.detach(), states.grad, norm.weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_transformers_forward_to_the_bit_and_backward(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 5, 3, 64, generator=generator) * torch.logspace(-3, 2, 3)[:, None]
    grad = torch.randn(states.shape, generator=generator)
    theirs = Qwen3RMSNorm(64, eps=1e-6)
    with torch.no_grad():
        theirs.weight.copy_(torch.linspace(0.5, -1.5, 64))
    exact = passes(theirs, states.to(dtype).float(), grad.to(dtype).float())
    theirs = theirs.to(dtype)
    ours = LeanRMSNorm(theirs.weight, 1e-6)
    expected = passes(theirs, states.to(dtype), grad.to(dtype))
    found = passes(ours, states.to(dtype), grad.to(dtype))
    assert torch.equal(found[0], expected[0])
    for mine, their, truth in zip(found[1:], expected[1:], exact[1:], strict=True):
        assert mine.dtype == dtype
        error, usual = ((each.float() - truth).norm() / truth.norm() for each in (mine, their))
        assert error <= 1.1 * usual + 1e-6


def test_a_frozen_weight_or_input_gets_no_gradient() -> None:
    norm = LeanRMSNorm(nn.Parameter(torch.ones(4), requires_grad=False), 1e-6)
    states = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    norm(states).square().sum().backward()
    assert norm.weight.grad is None
    assert torch.linalg.vecdot(states.grad, states.detach()).item() == pytest.approx(0, abs=1e-5)
    trained = LeanRMSNorm(nn.Parameter(torch.ones(4)), 1e-6)
    trained(states.detach()).sum().backward()
    assert trained.weight.grad is not None


@pytest.mark.parametrize("name", BODIES)
def test_every_body_has_them_under_the_same_names_but_for_another_formula(name: str) -> None:
    model = body_model(name)
    kinds = {
        type(module).__name__
        for module in model.modules()
        if type(module).__name__.endswith("RMSNorm")
    }
    assert kinds == ({"GptOssRMSNorm"} if name == "gpt_oss" else {"LeanRMSNorm"})
    use_lean_norms(model)  # again: nothing is left to replace
    assert not kinds & SAME_FORMULA
