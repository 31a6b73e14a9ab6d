"""Log-probabilities of given tokens."""

from __future__ import annotations

import math

import pytest
import torch
from tests.reference import next_token_by_hand

from cascadevl.losses import logprobs as module
from cascadevl.losses.logprobs import sample_sums, token_entropies, token_logprobs


def test_equal_those_by_hand() -> None:
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0)) * 4
    ids = torch.tensor([0, 10, 3, 3, 7, 1])
    wanted = [
        next_token_by_hand.logprob(row, token)
        for row, token in zip(logits.tolist(), ids.tolist(), strict=True)
    ]
    torch.testing.assert_close(token_logprobs(logits, ids), torch.tensor(wanted))


def test_any_leading_shape() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 1, 2], [4, 3, 0]])
    flat = token_logprobs(logits.flatten(0, 1), ids.flatten())
    assert torch.equal(token_logprobs(logits, ids), flat.view(2, 3))


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    logits = (torch.randn(4, 1000, generator=torch.Generator().manual_seed(2)) * 3).bfloat16()
    ids = torch.tensor([5, 50, 500, 999])
    found = token_logprobs(logits, ids)
    assert found.dtype == torch.float32
    assert torch.equal(found, token_logprobs(logits.float(), ids))
    in_bfloat16 = logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1).float()
    assert (found - in_bfloat16).abs().max() > 1e-3


def test_large_scores_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, 0.0], [0.0, -1e4]])
    assert token_logprobs(logits, torch.tensor([1, 0])).tolist() == [-1e4, 0.0]


def test_a_token_outside_the_vocabulary_is_an_error() -> None:
    # cross_entropy would take -100 for "ignore" and return 0 for it
    with pytest.raises(RuntimeError):
        token_logprobs(torch.zeros(1, 4), torch.tensor([-100]))


def test_gradient() -> None:
    logits = torch.randn(
        3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True
    )
    ids = torch.tensor([2, 6, 0])
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, ids), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_rows_equal_torch_with_the_gradient(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", {"cpu": 2 * 50})  # two rows of five at a time
    logits = (torch.randn(5, 50, generator=torch.Generator().manual_seed(4)) * 3).to(dtype)
    logits[1, 7] = -1e4  # a gradient at an unlikely token must not lose the others
    logits.requires_grad_()
    ids, grad = torch.tensor([0, 7, 49, 3, 3]), torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    wide = logits.detach().float().requires_grad_()
    expected = wide.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    found = token_logprobs(logits, ids)
    assert torch.equal(found, expected)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    (wanted,) = torch.autograd.grad(expected, wide, grad)
    (got,) = torch.autograd.grad(found, logits, grad)
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted.to(dtype), rtol=tolerance, atol=1e-6)


def test_sums_of_samples_whatever_their_order() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64, requires_grad=True)
    samples = torch.tensor([2, 0, 2, 3, 0])
    sums = sample_sums(values, samples, 5)
    assert sums.tolist() == [18.0, 0.0, 5.0, 8.0, 0.0]
    assert torch.autograd.gradcheck(lambda x: sample_sums(x, samples, 5), values)


def test_entropies_equal_those_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", {"cpu": 22})  # two rows at a time
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(3)) * 4
    wanted = []
    for row in logits.tolist():
        logs = [next_token_by_hand.logprob(row, token) for token in range(len(row))]
        wanted.append(-sum(math.exp(log) * log for log in logs))
    torch.testing.assert_close(token_entropies(logits), torch.tensor(wanted))


def test_entropies_of_the_extremes() -> None:
    logits = torch.zeros(2, 8)
    logits[1, 1:] = -torch.inf  # only one token can come
    assert token_entropies(logits).tolist() == pytest.approx([math.log(8), 0.0])
    assert token_entropies(logits.bfloat16()).dtype == torch.float32
