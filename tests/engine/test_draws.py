"""The arithmetic of drawing: by hand, against transformers, at its edges."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from tests.reference import sampling_by_hand
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cascadevl.engine import draws

VOCAB = 300
ALMOST_ONE = 1 - 2.0**-53


def column(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def limits(rows: int, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[Tensor]:
    return [torch.full((rows,), top_k), column([top_p] * rows), column([min_p] * rows)]


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_the_random_stream_is_splitmix64():
    # The first outputs of the generator begun with 1234567, as published with it.
    published = [
        *(6457827717110365317, 3203168211198807973, 9817491932198370423),
        *(4593380528125082431, 16408922859458223821),
    ]
    streams = np.full(5, 1234567, dtype=np.uint64)
    got = draws.uniforms(streams, np.arange(5))
    assert got.tolist() == [(number >> 11) / 2**53 for number in published]


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_a_uniform_is_a_function_of_seed_sample_and_token(seed: int):
    streams = np.array([draws.stream_of(seed, sample) for sample in (0, 1, 7)], dtype=np.uint64)
    for token in (0, 1, 4095, 2**40):
        got = draws.uniforms(streams, np.full(3, token))
        assert got.tolist() == [sampling_by_hand.uniform(seed, n, token) for n in (0, 1, 7)]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(60, 0.9, 0.02), (7, 0.99, 0.001), (100, 0.4, 0.001), (100, 0.99, 0.3)],
    ids=["all", "k", "p", "min p"],  # which of them cuts
)
def test_filtered_weights_are_those_of_transformers(top_k: int, top_p: float, min_p: float):
    generator = torch.Generator().manual_seed(1)
    logits, ids = random_logits(6), torch.randint(VOCAB, (6, 40), generator=generator)
    seen = torch.zeros(6, VOCAB, dtype=torch.bool).scatter(1, ids, True)
    scores = draws.penalised(draws.scores_of(logits), draws.widened(seen), torch.full((6,), 1.3))
    weights = draws.weights_of(scores, column([0.8] * 6))
    got = draws.filtered(weights, *limits(6, top_k=top_k, top_p=top_p, min_p=min_p))

    theirs = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits)
    for warper in (
        TemperatureLogitsWarper(0.8),
        TopKLogitsWarper(top_k),
        TopPLogitsWarper(top_p),
        MinPLogitsWarper(min_p),
    ):
        theirs = warper(ids, theirs)
    expected = theirs.softmax(-1)
    normalised = got / got.sum(-1, keepdim=True)
    assert (normalised[:, VOCAB:] == 0).all()
    torch.testing.assert_close(normalised[:, :VOCAB], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.97, 0.9999999999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_a_nucleus_of_any_width_is_found(spread: float, top_p: float):
    """Narrower than the first look, wider, and nearly everything."""
    logits = random_logits(3, 5000) * spread / 3
    weights = draws.weights_of(draws.scores_of(logits), column([1.0] * 3))
    got = draws.filtered(weights, *limits(3, top_p=top_p))
    for row, kept in zip(weights.double().numpy(), got.numpy(), strict=True):
        order = np.sort(row)[::-1]
        num = int(np.searchsorted(np.cumsum(order), top_p * row.sum())) + 1
        assert (kept > 0).sum() == min(num, (row > 0).sum())
        assert kept.max() == row.max()


def test_equals_at_the_border_stay_together():
    weights = torch.tensor([[0.4, 0.1, 0.2, 0.1, 0.2]])
    weights = torch.nn.functional.pad(weights, (0, draws.BLOCK - 5))
    by_k = draws.filtered(weights, *limits(1, top_k=2))
    by_p = draws.filtered(weights, *limits(1, top_p=0.5))
    assert by_k[0, :5].gt(0).tolist() == [True, False, True, False, True]
    assert by_p[0, :5].gt(0).tolist() == [True, False, True, False, True]
    flat = torch.full((1, 4 * draws.BLOCK), 1 / 512)
    assert draws.filtered(flat, *limits(1, top_p=0.3)).gt(0).all()


def test_the_nucleus_ends_with_the_token_that_just_reaches_the_share():
    weights = torch.tensor([[0.25, 0.5, 0.125, 0.125]])
    weights = torch.nn.functional.pad(weights, (0, draws.BLOCK - 4))
    for top_p, expected in ((0.5, [1]), (0.75, [0, 1])):
        kept = draws.filtered(weights, *limits(1, top_p=top_p))
        assert kept[0].nonzero().flatten().tolist() == expected


def test_a_share_that_rounding_puts_out_of_reach_keeps_the_whole_row():
    """Added to 1 one by one, the small weights are lost; as the sum of a block they are not."""
    weights = torch.zeros(1, 2 * draws.BLOCK)
    weights[0, 0], weights[0, draws.BLOCK :] = 1.0, 2.0**-54
    assert torch.equal(draws.filtered(weights, *limits(1, top_p=ALMOST_ONE)), weights)


def test_top_p_is_a_share_of_what_top_k_left():
    weights = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    weights = torch.nn.functional.pad(weights, (0, draws.BLOCK - 4))
    # Of 0.4 and 0.3, the first is 0.57: of everything, both would be needed for 0.5.
    kept = draws.filtered(weights, *limits(1, top_k=2, top_p=0.5))
    assert kept[0].nonzero().flatten().tolist() == [0]


def test_rows_have_filters_of_their_own():
    weights = draws.weights_of(draws.scores_of(random_logits(1)), column([1.0])).repeat(5, 1)
    got = draws.filtered(
        weights,
        torch.tensor([0, 1, 5, 0, 10**9]),
        column([1.0, 1.0, 1.0, 0.5, 1.0]),
        column([0.0, 0.0, 0.0, 0.0, 0.999]),
    )
    alone = [
        draws.filtered(weights[:1], *limits(1, *each))
        for each in ((0,), (1,), (5,), (0, 0.5), (0, 1.0, 0.999))
    ]
    assert torch.equal(got, torch.cat(alone))
    assert (got > 0).sum(1)[:3].tolist() == [VOCAB, 1, 5]


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-9, 1e9, 1e300])
def test_no_temperature_makes_a_weight_that_is_no_number(temperature: float):
    logits = torch.tensor([[3e38, -3e38, 3e38, float("-inf"), 0.0]])
    weights = draws.weights_of(draws.scores_of(logits), column([temperature]))[0]
    assert weights[:5].isfinite().all()
    assert weights[3] == 0
    assert (weights[5:] == 0).all()
    assert weights.sum() == pytest.approx(1.0)
    if temperature < 1:
        assert weights[:5].tolist() == [0.5, 0.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("uniform", [0.0, 0.5, ALMOST_ONE])
def test_what_weighs_nothing_is_never_drawn(uniform: float):
    """Weights of very different size, whose sums round differently in different orders."""
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randn(2000, 2 * draws.BLOCK, generator=generator) * 15).exp()
    weights[torch.rand(weights.shape, generator=generator) < 0.5] = 0
    weights[:1000, draws.BLOCK :] = 0
    tokens = draws.draw(weights, column([uniform] * 2000))
    assert (weights.gather(1, tokens[:, None]) > 0).all()
    if uniform == 0:
        assert torch.equal(tokens, (weights > 0).to(torch.uint8).argmax(1))


def test_a_token_is_drawn_where_the_sum_exceeds_its_share():
    weights = torch.zeros(1, 3 * draws.BLOCK)
    tokens = [0, 127, 128, 300, 383]  # at both ends of blocks, in the first and the last
    weights[0, tokens] = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0])
    shares = {0.0: 0, 0.999: 0, 1.0: 127, 2.999: 127, 3.0: 128, 4.0: 300, 6.999: 300, 7.0: 383}
    uniform = column(share / 8 for share in shares)
    got = draws.draw(weights.repeat(len(shares), 1), uniform)
    assert got.tolist() == list(shares.values())


def test_small_weights_beside_a_large_one_are_drawn_by_their_share():
    """In float32, 1 + 2**-30 is 1: none but the last of the small ones would ever come."""
    small, num = 2.0**-30, 64
    weights = torch.zeros(1, draws.BLOCK)
    weights[0, 0], weights[0, 1 : num + 1] = 1.0, small
    shares = [(1 + (token - 0.5) * small) / (1 + num * small) for token in (1, 11, num)]
    got = draws.draw(weights.repeat(len(shares), 1), column(shares))
    assert got.tolist() == [1, 11, num]
