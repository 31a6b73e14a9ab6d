"""The loss of process rewards equals the loops; each line of it has a test that dies with it."""

from __future__ import annotations

import math

import pytest
import torch
from tests.reference import process_reward_by_hand as by_hand
from torch import Tensor

from cascadevl.losses.next_token import sample_weights
from cascadevl.losses.process_reward import (
    LabelTokens,
    LossForm,
    ProcessRewardTerms,
    label_nll,
    label_weights,
    plus_probability,
    process_reward_loss,
)

FORMS: tuple[LossForm, ...] = ("vocabulary", "two_tokens")
TOKENS = LabelTokens(plus=4, minus=9)
LENGTHS = (3, 1, 5)
VOCAB = 13


def draw(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and weights of the steps of solutions of uneven lengths."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(sum(LENGTHS), VOCAB, generator=generator, dtype=torch.float64) * 2
    is_plus = torch.rand(sum(LENGTHS), generator=generator) > 0.4
    lengths = torch.tensor(LENGTHS)
    weights = sample_weights(lengths, "square").repeat_interleave(lengths)
    return logits.to(dtype).requires_grad_(), is_plus, weights


def terms(
    logits: Tensor, is_plus: Tensor, weights: Tensor, form: LossForm, minus_weight: float = 1.0
) -> ProcessRewardTerms:
    nll = label_nll(logits, is_plus, tokens=TOKENS, form=form)
    own = label_weights(weights, is_plus, minus_weight)
    return process_reward_loss(nll, is_plus, own, float(own.sum(dtype=torch.float64)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("minus_weight", [1.0, 3.0])
def test_equals_the_loops(form: LossForm, minus_weight: float) -> None:
    logits, is_plus, weights = draw()
    assert {*is_plus.tolist()} == {True, False}
    found = terms(logits, is_plus, weights, form, minus_weight)
    steps = list(zip(logits.tolist(), is_plus.tolist(), weights.tolist(), strict=True))
    wanted = by_hand.loss(steps, TOKENS.plus, TOKENS.minus, minus_weight, pair=form == "two_tokens")
    assert found.loss.item() == pytest.approx(wanted, rel=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_that_of_finite_differences(form: LossForm) -> None:
    logits, is_plus, weights = draw()
    (gradient,) = torch.autograd.grad(terms(logits, is_plus, weights, form, 2.0).loss, logits)
    wanted = torch.zeros_like(gradient)
    for row in range(len(logits)):
        for column in range(VOCAB):
            ends = []
            for shift in (1e-5, -1e-5):
                moved = logits.detach().clone()
                moved[row, column] += shift
                ends.append(terms(moved, is_plus, weights, form, 2.0).loss.item())
            wanted[row, column] = (ends[0] - ends[1]) / 2e-5
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-8)


def test_only_the_two_tokens_are_pulled_by_their_form() -> None:
    logits, is_plus, weights = draw()
    pulled = {
        form: torch.autograd.grad(terms(logits, is_plus, weights, form).loss, logits)[0] != 0
        for form in FORMS
    }
    assert pulled["vocabulary"].all()
    of_the_two = torch.zeros(VOCAB, dtype=torch.bool)
    of_the_two[[TOKENS.plus, TOKENS.minus]] = True
    assert torch.equal(pulled["two_tokens"], of_the_two.expand(len(logits), VOCAB))


@pytest.mark.parametrize("form", FORMS)
def test_labels_pull_to_their_own_side(form: LossForm) -> None:
    logits, is_plus, weights = draw()
    (gradient,) = torch.autograd.grad(terms(logits, is_plus, weights, form).loss, logits)
    own = torch.where(is_plus, TOKENS.plus, TOKENS.minus)
    other = torch.where(is_plus, TOKENS.minus, TOKENS.plus)
    rows = torch.arange(len(logits))
    assert (gradient[rows, own] < 0).all()
    assert (gradient[rows, other] > 0).all()


def test_shares_of_batches_add_up() -> None:
    logits, is_plus, weights = draw()
    whole = terms(logits, is_plus, weights, "vocabulary", 2.0)
    own = label_weights(weights, is_plus, 2.0)
    nll = label_nll(logits, is_plus, tokens=TOKENS, form="vocabulary")
    parts = [
        process_reward_loss(nll[part], is_plus[part], own[part], float(own.sum()))
        for part in (slice(0, 4), slice(4, None))
    ]
    for name in ("loss", "accuracy", "minus_share", "minus_found"):
        added = getattr(parts[0], name) + getattr(parts[1], name)
        torch.testing.assert_close(added, getattr(whole, name), rtol=1e-6, atol=1e-7)


def test_what_is_recorded_on_paper() -> None:
    """P of the label: 0.9 of "+", 0.2 of "+", 0.7 of "-", 0.4 of "-"; wrong ones count twice."""
    nll = -torch.tensor([0.9, 0.2, 0.7, 0.4], dtype=torch.float64).log()
    is_plus = torch.tensor([True, True, False, False])
    weights = label_weights(torch.ones(4, dtype=torch.float64), is_plus, 2.0)
    found = process_reward_loss(nll, is_plus, weights, 6.0)
    assert found.loss.item() == pytest.approx(
        -(math.log(0.9) + math.log(0.2) + 2 * math.log(0.7) + 2 * math.log(0.4)) / 6
    )
    assert found.accuracy.item() == pytest.approx(3 / 6)
    assert found.minus_share.item() == pytest.approx(4 / 6)
    assert found.minus_found.item() == pytest.approx(2 / 6)


def test_scores_equal_the_loops_also_from_bfloat16() -> None:
    logits, _, _ = draw()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 1e-6)):
        given = logits.detach().to(dtype)
        found = plus_probability(given, TOKENS)
        wanted = [
            by_hand.probability(scores, TOKENS.plus, [TOKENS.plus, TOKENS.minus])
            for scores in given.double().tolist()
        ]
        assert found.tolist() == pytest.approx(wanted, abs=tolerance)
    assert plus_probability(logits.bfloat16(), TOKENS).dtype == torch.float32
