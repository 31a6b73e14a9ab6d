"""ViCO: equal to the report by hand, and every line of it has a test that dies with it.

Each test names the mutants it kills: a direction of the divergence, a mass left out, a mean, what
gets a gradient, a precision.
"""

from __future__ import annotations

import math

import pytest
import torch
from tests.reference import vico_by_hand as by_hand
from torch import Tensor

from cascadevl.losses import logprobs as module
from cascadevl.losses.next_token import sample_weights
from cascadevl.losses.vico import TopTokens, consistency_loss, merged_kl, top_tokens, whole_kl

VOCAB, TARGETS = 13, 6


def drawn(seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Scores of the model, with a gradient, and of the reference."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(TARGETS, VOCAB, generator=generator, dtype=torch.float64) * scale
    moved = torch.randn(TARGETS, VOCAB, generator=generator, dtype=torch.float64)
    return (reference + moved).requires_grad_(), reference


@pytest.mark.parametrize("seed", range(3))
def test_the_whole_divergence_equals_the_report_by_hand(seed: int) -> None:
    """Kills: the divergence the other way round, probabilities taken for their logarithms."""
    logits, reference = drawn(seed)
    wanted = [
        by_hand.whole(*pair) for pair in zip(reference.tolist(), logits.tolist(), strict=True)
    ]
    assert whole_kl(logits, reference).tolist() == pytest.approx(wanted, rel=1e-12)
    turned = whole_kl(reference, logits).tolist()
    assert max(abs(a - b) for a, b in zip(wanted, turned, strict=True)) > 0.1


@pytest.mark.parametrize("k", [1, 3, VOCAB - 1])
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_the_merged_divergence_equals_the_report_by_hand(
    k: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: the bucket left out, its mass taken from the wrong side, blocks of rows mixed up."""
    monkeypatch.setattr(module, "BLOCK", {"cpu": rows * VOCAB})
    logits, reference = drawn()
    found = merged_kl(logits, top_tokens(reference, k)).tolist()
    wanted = [
        by_hand.merged(*pair, k) for pair in zip(reference.tolist(), logits.tolist(), strict=True)
    ]
    assert found == pytest.approx(wanted, rel=1e-12)


def test_what_merging_loses_is_what_the_formula_says() -> None:
    """A lower bound, whose gap is the divergence within the bucket."""
    logits, reference = drawn()
    whole = whole_kl(logits, reference)
    for k in (1, 4, 9):
        gap = (whole - merged_kl(logits, top_tokens(reference, k))).tolist()
        pairs = zip(reference.tolist(), logits.tolist(), strict=True)
        assert gap == pytest.approx([by_hand.within(*pair, k) for pair in pairs], abs=1e-12)
        assert min(gap) > 0


@pytest.mark.parametrize("k", [VOCAB - 1, VOCAB, 10 * VOCAB])
def test_a_bucket_of_one_token_loses_nothing(k: int) -> None:
    logits, reference = drawn()
    top = top_tokens(reference, k)
    assert top.ids.shape == (TARGETS, VOCAB - 1)
    torch.testing.assert_close(merged_kl(logits, top), whole_kl(logits, reference))


def test_top_tokens_on_paper() -> None:
    """Kills: the least probable tokens, an order that is none, a rest that is a probability."""
    logits = torch.tensor([[0.1, 0.2, 0.4, 0.3]], dtype=torch.float64).log() + 7
    top = top_tokens(logits, 2)
    assert top.ids.tolist() == [[2, 3]]
    assert top.logprobs.exp()[0].tolist() == pytest.approx([0.4, 0.3])
    assert top.rest.exp().item() == pytest.approx(0.3)
    assert not top.logprobs.requires_grad


def test_one_target_on_paper() -> None:
    """Kills: a sign, a factor, the mass of the rest. All numbers worked by hand."""
    reference = torch.tensor([[0.5, 0.3, 0.1, 0.1]], dtype=torch.float64).log()
    logits = torch.tensor([[0.25, 0.25, 0.3, 0.2]], dtype=torch.float64).log()
    found = merged_kl(logits, top_tokens(reference, 2)).item()
    wanted = 0.5 * math.log(2) + 0.3 * math.log(0.3 / 0.25) + 0.2 * math.log(0.2 / 0.5)
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("k", [1, 4, VOCAB - 1])
def test_gradient_by_finite_differences(k: int) -> None:
    """Kills: the gradient of the top tokens or of the others alone, in any block of rows."""
    logits, reference = drawn()
    top = top_tokens(reference, k)
    assert torch.autograd.gradcheck(lambda x: merged_kl(x, top), logits)
    assert torch.autograd.gradcheck(lambda x: whole_kl(x, reference), logits)


def test_the_gradient_on_paper() -> None:
    """Kills: p and q exchanged. A top token: ``q - p``; another: ``q (1 - p_rest / q_rest)``."""
    reference = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
    logits = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log().requires_grad_()
    merged_kl(logits, top_tokens(reference, 1)).sum().backward()
    assert logits.grad is not None
    part = 1 - 0.4 / 0.8
    assert logits.grad[0].tolist() == pytest.approx([0.2 - 0.6, 0.5 * part, 0.3 * part])


def test_equal_models_have_nothing_to_learn() -> None:
    logits, _ = drawn()
    kl = merged_kl(logits, top_tokens(logits, 4))
    kl.sum().backward()
    torch.testing.assert_close(kl, torch.zeros_like(kl))
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits))


def test_nothing_flows_to_the_reference() -> None:
    """Kills: a reference without its detach."""
    logits, reference = drawn()
    reference.requires_grad_()
    whole_kl(logits, reference).sum().backward()
    assert reference.grad is None
    top = top_tokens(reference, 3)
    learned = TopTokens(
        ids=top.ids, logprobs=top.logprobs.requires_grad_(), rest=top.rest.requires_grad_()
    )
    merged_kl(logits, learned).sum().backward()
    assert learned.logprobs.grad is None
    assert learned.rest.grad is None


@pytest.mark.parametrize("move", [0.05, 1.0])
def test_bfloat16_logits_are_normalised_in_float32(move: float) -> None:
    """Kills: logarithms in the logits' own precision."""
    generator = torch.Generator().manual_seed(2)
    reference = (torch.randn(5, 3000, generator=generator) * 3).bfloat16()
    logits = (reference.float() + move * torch.randn(5, 3000, generator=generator)).bfloat16()
    top = top_tokens(reference, 64)
    found = merged_kl(logits, top)
    assert found.dtype == torch.float32
    wide = top_tokens(reference.double(), 64)
    wanted = merged_kl(logits.double(), wide)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


def test_the_gradient_comes_in_the_precision_of_the_logits() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    logits.requires_grad_()
    reference = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    merged_kl(logits, top_tokens(reference, 5)).sum().backward()
    wide = logits.detach().double().requires_grad_()
    merged_kl(wide, top_tokens(reference, 5)).sum().backward()
    assert logits.grad is not None
    assert wide.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-2, atol=1e-4)


def test_far_away_models_stay_finite() -> None:
    """Kills: ``p_rest / q_rest`` as a quotient, ``log(1 - sum q)`` as the mass of the rest."""
    reference = torch.zeros(2, 6)
    reference[:, 0] = math.log(2)
    logits = torch.zeros(2, 6)
    logits[0, 0], logits[1, 5] = 300.0, -300.0
    logits.requires_grad_()
    kl = merged_kl(logits, top_tokens(reference, 1))
    kl.sum().backward()
    assert kl.isfinite().all()
    wanted = 2 / 7 * math.log(2 / 7) + 5 / 7 * (math.log(1 / 7) + 300)
    assert kl[0].item() == pytest.approx(wanted, rel=1e-5)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_loss_is_a_mean_over_a_responses_tokens_and_then_over_responses() -> None:
    """Kills: a mean over all tokens, where long responses pull more; a mean of micro-batches."""
    logits, reference = drawn()
    lengths = torch.tensor([1, 5])
    samples = torch.repeat_interleave(torch.arange(2), lengths)
    weights = sample_weights(lengths, "sample")[samples]
    kl = whole_kl(logits, reference)
    tokens = list(zip(reference.tolist(), logits.tolist(), strict=True))
    wanted = by_hand.loss([tokens[:1], tokens[1:]])
    found = consistency_loss(kl, weights, float(weights.sum()))
    assert found.item() == pytest.approx(wanted, rel=1e-6)
    assert kl.mean().item() != pytest.approx(wanted, rel=1e-2)
    shares = [consistency_loss(kl[part], weights[part], 2.0) for part in (slice(2), slice(2, 6))]
    assert sum(shares).item() == pytest.approx(wanted, rel=1e-6)  # type: ignore[union-attr]


def test_parts_go_together_and_apart() -> None:
    _, reference = drawn()
    whole = top_tokens(reference, 3)
    assert len(whole) == TARGETS
    again = TopTokens.joined([whole.at(slice(0, 2)), whole.at(slice(2, TARGETS))])
    assert torch.equal(again.ids, whole.ids)
    assert torch.equal(again.logprobs, whole.logprobs)
    assert torch.equal(again.rest, whole.rest)
    assert torch.equal(whole.to("cpu").ids, whole.ids)
