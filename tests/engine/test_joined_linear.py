"""Layers that are computed together give what each gives alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cascadevl.engine.int8_linear import Int8Linear
from cascadevl.engine.joined_linear import join, sets_of

WIDTHS = (64, 32, 32)


def _linears(*, bias: bool, seed: int = 0) -> list[nn.Linear]:
    torch.manual_seed(seed)
    return [nn.Linear(48, width, bias=bias) for width in WIDTHS]


class _Plain(nn.Linear):
    """Stands for a packed layer where none is available."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None)
        self.calls = 0
        self.load(weight, bias)

    @property
    def num_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters())

    @torch.no_grad()
    def load(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight.copy_(weight)
        if bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_the_same_as_alone_in_one_product(bias: bool) -> None:
    linears = _linears(bias=bias)
    parts = join(linears, _Plain)
    for seed in range(2):
        x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(seed))
        for linear, part in zip(linears, parts, strict=True):
            torch.testing.assert_close(part(x), linear(x), rtol=1e-6, atol=1e-6)
    assert parts[0]._joined.layer.calls == 2  # type: ignore[attr-defined]


@torch.no_grad()
def test_any_order_and_other_inputs_between() -> None:
    linears = _linears(bias=True)
    parts = join(linears, _Plain)
    one, other = torch.randn(3, 48), torch.randn(3, 48)
    for place, x in ((2, one), (0, one), (1, other), (1, one), (0, other), (2, other), (2, one)):
        torch.testing.assert_close(parts[place](x), linears[place](x), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_nothing_is_kept_once_all_have_been_asked() -> None:
    parts = join(_linears(bias=False), _Plain)
    x = torch.randn(3, 48)
    for part in parts:
        part(x)
    assert parts[0]._joined._input is None
    assert parts[0]._joined._parts == ()


@torch.no_grad()
def test_int8_is_exactly_that_of_single_layers() -> None:
    linears = _linears(bias=True)
    for rows in (1, 40):
        x = torch.randn(rows, 48)
        for linear, part in zip(linears, join(linears, Int8Linear), strict=True):
            assert torch.equal(part(x), Int8Linear(linear.weight, linear.bias)(x))


@torch.no_grad()
def test_new_weights_count_when_all_are_there() -> None:
    parts, new = join(_linears(bias=True), _Plain), _linears(bias=True, seed=1)
    x = torch.randn(3, 48)
    before = parts[0](x)
    parts[0].load(new[0].weight, new[0].bias)
    assert torch.equal(parts[0](x.clone()), before)
    for part, linear in zip(parts[1:], new[1:], strict=True):
        part.load(linear.weight, linear.bias)
    for part, linear in zip(parts, new, strict=True):
        torch.testing.assert_close(part(x), linear(x), rtol=1e-6, atol=1e-6)


def test_the_set_shares_its_memory() -> None:
    parts = join(_linears(bias=False), _Plain)
    assert sum(part.num_bytes for part in parts) == 4 * 48 * sum(WIDTHS)
    assert [part.out_features for part in parts] == list(WIDTHS)


def test_which_layers_belong_together() -> None:
    q, k, v = (nn.Linear(8, 8) for _ in range(3))
    o, unlike = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
    gate, up = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
    layers = {
        **{"0.attn.q_proj": q, "0.attn.k_proj": k, "0.attn.v_proj": v, "0.attn.o_proj": o},
        **{"0.mlp.gate_proj": gate, "0.mlp.up_proj": up},
        **{"1.attn.q_proj": q, "1.attn.k_proj": unlike, "1.attn.v_proj": v},
    }
    assert sets_of(layers) == [
        ("0.attn.q_proj", "0.attn.k_proj", "0.attn.v_proj"),
        ("0.attn.o_proj",),
        ("0.mlp.gate_proj", "0.mlp.up_proj"),
        ("1.attn.q_proj",),
        ("1.attn.k_proj",),
        ("1.attn.v_proj",),
    ]
