"""Linear layers with int8 weights, against loops over floats and products in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cascadevl.engine.int8_linear import Int8Linear, Int8Table, quantise
from cascadevl.errors import CheckpointError

STEP = 2.0**-8
"""Half the distance of neighbouring bfloat16 numbers, relative: the error of one rounding."""


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantised_by_hand(rows: list[list[float]]) -> tuple[list[list[int]], list[float]]:
    """The same with floats and loops."""
    levels, scales = [], []
    for row in rows:
        scale = float(torch.tensor(max(abs(w) for w in row) / 127).bfloat16()) or 1.0
        scales.append(scale)
        levels.append([max(-127, min(127, round(w / scale))) for w in row])
    return levels, scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantised_as_by_hand(dtype: torch.dtype):
    weight = drawn(9, 21, dtype=dtype) * torch.logspace(-3, 2, 9).to(dtype)[:, None]
    weight[4] = 0
    levels, scales = quantise(weight)
    assert (levels.tolist(), scales.tolist()) == quantised_by_hand(weight.tolist())


def test_every_weight_is_within_half_a_step():
    weight = drawn(200, 64, dtype=torch.float32)
    levels, scale = quantise(weight)
    error = (weight - levels.float() * scale.float()[:, None]).abs()
    assert (error <= 0.5001 * scale.float()[:, None]).all()


def test_a_weight_that_is_not_finite_is_refused():
    weight = drawn(5, 16)
    weight[3, 2] = torch.inf
    with pytest.raises(CheckpointError, match="row 3 of a weight of shape \\(5, 16\\)"):
        Int8Linear(weight, None)


@pytest.mark.parametrize("in_features", [64, 48, 40, 17])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 12, 13, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_product_is_that_of_the_dequantised_weight(
    in_features: int, num_rows: int, has_bias: bool
):
    weight, bias = drawn(33, in_features), drawn(33, seed=1) if has_bias else None
    layer = Int8Linear(weight, bias)
    x = drawn(2, num_rows, in_features, seed=2)
    out = layer(x)
    product = x.double() @ layer.dequantised().double().T
    exact = product + (0 if bias is None else bias.double())
    assert out.dtype == x.dtype
    assert out.shape == exact.shape
    # Three roundings: of the sum, of the scaled sum, of the sum with the bias.
    assert ((out.double() - exact).abs() <= STEP * (2 * product.abs() + exact.abs()) + 1e-3).all()


def test_few_and_many_rows_and_any_block_give_the_same():
    weight, x = drawn(70, 64), drawn(12, 64, seed=1)
    kernel = Int8Linear(weight, None)(x).float()
    for block_bytes in (1, 2 * 64 * 32, 2**20):
        table = Int8Table(kernel_rows=0, block_bytes=block_bytes)
        widened = Int8Linear(weight, None, table=table)(x).float()
        assert (kernel - widened).norm() < 2 * STEP * kernel.norm()


def test_a_view_into_the_middle_of_a_tensor_is_read_right():
    layer = Int8Linear(drawn(8, 32), None)
    flat = drawn(3 * 32 + 5)
    x = flat[5:].view(3, 32)
    assert x.data_ptr() % 32
    torch.testing.assert_close(layer(x), layer(x.clone()), rtol=0, atol=0)


def test_float32_comes_back_as_float32():
    weight, x = drawn(24, 32), drawn(4, 32, seed=1)
    layer = Int8Linear(weight, drawn(24))
    assert layer(x.float()).dtype == torch.float32
    torch.testing.assert_close(layer(x.float()), layer(x).float(), rtol=0, atol=0)


def test_new_weights_are_taken_in_place():
    first, second = drawn(24, 32), drawn(24, 32, seed=1)
    layer, x = Int8Linear(first, drawn(24)), drawn(4, 32, seed=2)
    place = layer._weight.data_ptr()
    layer.load(second, drawn(24, seed=3))
    wanted = Int8Linear(second, drawn(24, seed=3))
    assert layer._weight.data_ptr() == place
    torch.testing.assert_close(layer(x), wanted(x), rtol=0, atol=0)


def test_half_the_bytes():
    assert Int8Linear(drawn(24, 32), drawn(24)).num_bytes == 24 * 32 + 2 * 24 + 2 * 24


def test_gradients_are_refused():
    layer = Int8Linear(drawn(8, 16), None)
    x = drawn(2, 16).requires_grad_()
    with pytest.raises(ValueError, match="have no gradient"):
        layer(x)
    with torch.no_grad():
        assert layer(x).shape == (2, 8)
