"""The vision tower's attention on a CPU against the formula, its gradient and torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cascadevl.model import dense_attention as module
from cascadevl.model.dense_attention import dense_attention


def states(tiles: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value as the vision tower hands them over: views with heads moved forward."""
    generator = torch.Generator().manual_seed(tokens)
    drawn = torch.randn(3, tiles, tokens, heads, dim, generator=generator, dtype=torch.float64)
    return [each.to(dtype).transpose(1, 2).requires_grad_() for each in drawn]


@pytest.fixture(params=[1, 2, 5])
def heads_together(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few, some or all of five heads of seven tokens computed together."""
    monkeypatch.setattr(module, "CELLS", request.param * 7**2)


@pytest.mark.usefixtures("heads_together")
def test_equals_the_formula_and_its_gradient_the_differences() -> None:
    query, key, value = states(3, 7, 5, 4, torch.float64)
    expected = torch.softmax(query @ key.mT * 0.3, -1) @ value
    torch.testing.assert_close(
        dense_attention(query, key, value, 0.3), expected.transpose(1, 2), rtol=0, atol=1e-14
    )
    assert torch.autograd.gradcheck(lambda *each: dense_attention(*each, 0.3), (query, key, value))


def test_is_an_operator_that_compilers_understand() -> None:
    torch.library.opcheck(dense_attention, (*states(2, 6, 3, 4, torch.float32), 0.5))


def test_in_bfloat16_it_is_as_near_to_the_truth_as_torch() -> None:
    exact = states(2, 150, 3, 16, torch.float64)
    grad = torch.ones(2, 150, 3, 16, dtype=torch.float64) / 150
    grad[:, ::2] *= -1
    truth = torch.autograd.grad(dense_attention(*exact, 0.25), exact, grad)

    def errors(ours: bool) -> Tensor:
        rough = [each.detach().bfloat16().requires_grad_() for each in exact]
        if ours:
            out = dense_attention(*rough, 0.25)
        else:
            out = F.scaled_dot_product_attention(*rough, scale=0.25).transpose(1, 2)
        found = torch.autograd.grad(out, rough, grad.bfloat16())
        return torch.stack([(f - t).norm() / t.norm() for f, t in zip(found, truth, strict=True)])

    assert (errors(True) < 1.5 * errors(False) + 1e-3).all()
