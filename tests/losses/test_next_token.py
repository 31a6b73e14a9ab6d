"""The next-token loss and its three averagings; each line of it has a test that dies with it."""

from __future__ import annotations

import pytest
import torch
from tests.reference import next_token_by_hand
from torch import Tensor

from cascadevl.losses.next_token import Averaging, next_token_loss, sample_weights, token_nll

POWERS: dict[Averaging, float] = {"token": 0.0, "square": 0.5, "sample": 1.0}
LENGTHS = (1, 4, 9, 2)
VOCAB = 13


def draw(*, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits and targets of samples of uneven lengths, one behind the other."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(sum(LENGTHS), VOCAB, generator=generator, dtype=torch.float64) * 3
    ids = torch.randint(0, VOCAB, (sum(LENGTHS),), generator=generator)
    return logits.to(dtype).requires_grad_(), ids


def weights_of(averaging: Averaging) -> Tensor:
    return sample_weights(torch.tensor(LENGTHS), averaging).repeat_interleave(torch.tensor(LENGTHS))


def samples_of(logits: Tensor, ids: Tensor) -> list[next_token_by_hand.Sample]:
    tokens = list(zip(logits.tolist(), ids.tolist(), strict=True))
    found = []
    for length in LENGTHS:
        found.append(tokens[:length])
        tokens = tokens[length:]
    return found


@pytest.mark.parametrize("averaging", POWERS)
def test_equals_the_report_by_hand(averaging: Averaging) -> None:
    logits, ids = draw()
    weights = weights_of(averaging)
    loss = next_token_loss(token_nll(logits, ids), weights, float(weights.sum()))
    wanted = next_token_by_hand.loss(samples_of(logits.detach(), ids), POWERS[averaging])
    assert loss.item() == pytest.approx(wanted, rel=1e-6)


def test_the_three_averagings_differ() -> None:
    logits, ids = draw()
    nll = token_nll(logits, ids)
    losses = [
        next_token_loss(nll, weights_of(averaging), weights_of(averaging).sum()).item()
        for averaging in POWERS
    ]
    assert len({round(loss, 3) for loss in losses}) == 3


def test_weights_on_paper() -> None:
    lengths = torch.tensor([1, 4, 16, 0])
    assert sample_weights(lengths, "token").tolist() == [1, 1, 1, 0]
    assert sample_weights(lengths, "square").tolist() == [1, 0.5, 0.25, 0]
    assert sample_weights(lengths, "sample").tolist() == [1, 0.25, 0.0625, 0]
    assert sample_weights(lengths, "square").dtype == torch.float32


def test_each_sample_pulls_by_its_length_to_the_power() -> None:
    # the whole pull of a sample is l * w: l, sqrt(l) and 1
    lengths = torch.tensor([1, 4, 25])
    for averaging, wanted in (("token", [1, 4, 25]), ("square", [1, 2, 5]), ("sample", [1, 1, 1])):
        pull = lengths * sample_weights(lengths, averaging)
        torch.testing.assert_close(pull, torch.tensor(wanted, dtype=torch.float32))


def test_token_averaging_equals_cross_entropy() -> None:
    logits, ids = draw()
    loss = next_token_loss(token_nll(logits, ids), weights_of("token"), float(sum(LENGTHS)))
    peer = torch.nn.functional.cross_entropy(logits, ids)
    torch.testing.assert_close(loss, peer, rtol=1e-6, atol=1e-6)
    gradient, peers = (torch.autograd.grad(x, logits)[0] for x in (loss, peer))
    torch.testing.assert_close(gradient, peers, rtol=1e-6, atol=1e-6)


def test_each_nll_equals_cross_entropy_unreduced() -> None:
    logits, ids = draw()
    peer = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    torch.testing.assert_close(token_nll(logits, ids), peer, rtol=1e-6, atol=1e-6)
    assert (token_nll(logits, ids) > 0).all()


def test_ids_are_not_shifted_again() -> None:
    # the logits of row i predict ids[i]; a second shift would look at ids[i + 1]
    logits = torch.full((3, 4), -20.0)
    logits[torch.arange(3), torch.tensor([2, 0, 3])] = 20.0
    assert token_nll(logits, torch.tensor([2, 0, 3])).max() < 1e-6
    assert token_nll(logits, torch.tensor([0, 3, 2])).min() > 30


@pytest.mark.parametrize("averaging", POWERS)
def test_gradient_in_float64(averaging: Averaging) -> None:
    logits, ids = draw(dtype=torch.float64)
    weights = weights_of(averaging)

    def loss(logits: Tensor) -> Tensor:
        return next_token_loss(token_nll(logits, ids), weights, weights.sum())

    assert torch.autograd.gradcheck(loss, logits)


def test_gradient_of_a_token_is_its_share_times_probability_minus_one() -> None:
    logits, ids = draw(dtype=torch.float64)
    weights = weights_of("square")
    next_token_loss(token_nll(logits, ids), weights, weights.sum()).backward()
    wanted = torch.softmax(logits.detach(), -1)
    wanted[torch.arange(len(ids)), ids] -= 1
    wanted *= (weights.double() / weights.double().sum())[:, None]
    torch.testing.assert_close(logits.grad, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("averaging", POWERS)
@pytest.mark.parametrize("split", [(0, 1), (0, 5, 14), (0, 1, 5, 14)])
def test_micro_batches_with_one_weight_sum_equal_one_batch(
    averaging: Averaging, split: tuple[int, ...]
) -> None:
    logits, ids = draw()
    weights = weights_of(averaging)
    weight_sum = weights.sum()
    whole = next_token_loss(token_nll(logits, ids), weights, weight_sum)
    parts = [
        next_token_loss(token_nll(logits[a:b], ids[a:b]), weights[a:b], weight_sum)
        for a, b in zip(split, (*split[1:], len(ids)), strict=True)
    ]
    total = torch.stack(parts).sum()
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(total, logits)[0],
        torch.autograd.grad(whole, logits)[0],
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("averaging", POWERS)
def test_a_mean_of_means_is_something_else(averaging: Averaging) -> None:
    # micro-batches of samples (1, 4) and (9, 2): their weight sums differ under every averaging
    # but the sample averaging, where each holds two samples; there (1) and (4, 9, 2) differ
    border = 1 if averaging == "sample" else 5
    logits, ids = draw()
    weights = weights_of(averaging)
    whole = next_token_loss(token_nll(logits, ids), weights, weights.sum())
    means = [
        next_token_loss(token_nll(logits[part], ids[part]), weights[part], weights[part].sum())
        for part in (slice(0, border), slice(border, None))
    ]
    wrong = torch.stack(means).mean()
    difference = torch.autograd.grad(wrong, logits)[0] - torch.autograd.grad(whole, logits)[0]
    assert difference.abs().max() > 1e-2
    assert (wrong - whole).abs() > 1e-2


def test_low_precision_is_summed_in_float32() -> None:
    # 4,096 equal terms: a bfloat16 sum stops growing at 256
    nll = token_nll(torch.zeros(4096, 8, dtype=torch.bfloat16), torch.zeros(4096).long())
    loss = next_token_loss(nll, torch.ones(4096, dtype=torch.bfloat16), 4096.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2.0794415, rel=1e-6)


def test_a_batch_without_targets_adds_nothing_but_stays_differentiable() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    nothing = torch.zeros(0)
    loss = next_token_loss(token_nll(logits, torch.zeros(0).long()), nothing, 3.0)
    loss.backward()
    assert loss.item() == 0
