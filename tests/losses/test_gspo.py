"""GSPO and its token-level sibling; each line of them has a test that dies with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reference import gspo_by_hand
from torch import Tensor

from cascadevl.losses.gspo import PolicyTerms, group_advantages, grpo_loss, gspo_loss

LENGTHS = (1, 5, 3, 2, 7)
CLIP: dict[str, Any] = {"clip_low": 0.1, "clip_high": 0.2}
LOSSES: dict[str, Callable[..., PolicyTerms]] = {"sequence": gspo_loss, "token": grpo_loss}
BY_HAND = {"sequence": gspo_by_hand.gspo, "token": gspo_by_hand.grpo}
TRL = json.loads((Path(__file__).parents[1] / "golden" / "gspo_trl.json").read_text("utf-8"))


def drawn(spread: float = 0.3, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities now and before, the answer of each token, and an advantage an answer."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64) * 3
    now = old + spread * torch.randn(len(old), generator=generator, dtype=torch.float64)
    answer = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    advantages = torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64)
    return now.requires_grad_(), old, answer, advantages


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def pairs(now: Tensor, old: Tensor) -> list[gspo_by_hand.Answer]:
    both = list(zip(now.tolist(), old.tolist(), strict=True))
    found = []
    for length in LENGTHS:
        found.append(both[:length])
        both = both[length:]
    return found


@pytest.mark.parametrize("level", LOSSES)
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_paper_by_hand(level: str, seed: int) -> None:
    now, old, answer, advantages = drawn(seed=seed)
    terms = LOSSES[level](now, old, answer, advantages, **CLIP, num_answers=7)
    wanted = BY_HAND[level](pairs(now, old), advantages.tolist(), 0.1, 0.2, 7)
    assert terms.loss.item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("unbiased", [False, True])
def test_advantages_equal_the_paper_by_hand(unbiased: bool) -> None:
    rewards = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = group_advantages(rewards, unbiased=unbiased)
    for row, group in zip(found.tolist(), rewards.tolist(), strict=True):
        wanted = gspo_by_hand.advantages(group, unbiased=unbiased, eps=1e-6)
        assert row == pytest.approx(wanted, rel=1e-12)


def test_population_and_sample_deviation_on_paper() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    population = group_advantages(rewards, eps=1e-12)
    sample = group_advantages(rewards, unbiased=True, eps=1e-12)
    assert population[0].tolist() == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3])
    assert sample[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5])


@pytest.mark.parametrize(("value", "size"), [(0.0, 16), (0.9, 16), (1 / 3, 16), (0.1, 3)])
def test_equal_rewards_teach_nothing_at_all(value: float, size: int) -> None:
    rewards = torch.full((2, size), value, dtype=torch.float64)
    assert group_advantages(rewards).eq(0).all()


def test_equal_rewards_are_known_by_comparing_them() -> None:
    rewards = torch.full((1, 3), 0.1, dtype=torch.float64)
    assert (rewards - rewards.mean()).abs().max() > 0  # their mean is not quite one of them
    assert group_advantages(rewards, eps=1e-20).eq(0).all()


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to be compared with"):
        group_advantages(torch.ones(3, 1, dtype=torch.float64))


@pytest.mark.parametrize("level", LOSSES)
def test_equals_trl(level: str) -> None:
    """The very loss of TRL's GRPOTrainer; tests/golden/make_gspo.py ran it."""
    cases = [case for case in TRL["cases"] if case["level"] == level]
    assert len(cases) >= 4
    for case in cases:
        now = torch.tensor(flat(case["logprobs"]), dtype=torch.float64, requires_grad=True)
        old = torch.tensor(flat(case["old_logprobs"]), dtype=torch.float64)
        lengths = torch.tensor([len(each) for each in case["logprobs"]])
        terms = LOSSES[level](
            now,
            old,
            torch.arange(len(lengths)).repeat_interleave(lengths),
            torch.tensor(case["advantages"], dtype=torch.float64),
            clip_low=case["clip_low"],
            clip_high=case["clip_high"],
            num_answers=len(lengths),
        )
        assert terms.loss.item() == pytest.approx(case["loss"], abs=1e-6, rel=1e-6)
        (gradient,) = torch.autograd.grad(terms.loss, now)
        wanted = torch.tensor(flat(case["gradient"]), dtype=torch.float64)
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-6)
        assert terms.clipped.mean().item() == pytest.approx(case["clipped"], abs=1e-6)


@pytest.mark.parametrize("level", LOSSES)
@pytest.mark.parametrize("spread", [0.01, 0.3])
def test_gradient_by_finite_differences(level: str, spread: float) -> None:
    now, old, answer, advantages = drawn(spread)

    def loss(now: Tensor) -> Tensor:
        return LOSSES[level](now, old, answer, advantages, **CLIP, num_answers=5).loss

    assert torch.autograd.gradcheck(loss, now)


def one(
    ratio: float, advantage: float, level: str = "sequence", **clip: float
) -> tuple[PolicyTerms, Tensor]:
    """One answer of four tokens that are all so much more likely than before, and the gradient."""
    now = torch.full((4,), math.log(ratio), dtype=torch.float64, requires_grad=True)
    terms = LOSSES[level](
        now,
        torch.zeros(4, dtype=torch.float64),
        torch.zeros(4, dtype=torch.int64),
        torch.tensor([advantage], dtype=torch.float64),
        **{**CLIP, **clip},
        num_answers=1,
    )
    return terms, torch.autograd.grad(terms.loss, now)[0]


@pytest.mark.parametrize("level", LOSSES)
@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "learns"),
    [
        (1.05, 1.0, 1.05, True),  # within the bounds
        (0.95, -1.0, -0.95, True),
        (1.5, 1.0, 1.2, False),  # better, and already likely enough
        (0.5, -1.0, -0.9, False),  # worse, and already unlikely enough
        (0.5, 1.0, 0.5, True),  # better, but it got less likely: pulled back
        (1.5, -1.0, -1.5, True),  # worse, but it got more likely: pulled back
    ],
)
def test_the_six_places_an_answer_can_be_in(
    level: str, ratio: float, advantage: float, objective: float, learns: bool
) -> None:
    terms, gradient = one(ratio, advantage, level)
    assert terms.loss.item() == pytest.approx(-objective)
    assert terms.clipped.item() == (not learns)
    assert terms.ratios.item() == pytest.approx(ratio)
    if not learns:
        assert gradient.eq(0).all()
    else:  # a step downhill makes better answers more likely and worse ones less
        assert (gradient * -advantage > 0).all()


@pytest.mark.parametrize("level", LOSSES)
def test_the_two_bounds_are_apart(level: str) -> None:
    high, _ = one(3.0, 1.0, level, clip_low=0.01, clip_high=0.5)
    low, _ = one(0.2, -1.0, level, clip_low=0.01, clip_high=0.5)
    assert high.loss.item() == pytest.approx(-1.5)
    assert low.loss.item() == pytest.approx(0.99)


@pytest.mark.parametrize("level", LOSSES)
def test_before_the_first_step_the_gradient_is_that_of_the_policy_gradient(level: str) -> None:
    now, _, answer, advantages = drawn()
    terms = LOSSES[level](now, now.detach(), answer, advantages, **CLIP, num_answers=5)
    assert terms.loss.item() == pytest.approx(-advantages.mean().item())
    (gradient,) = torch.autograd.grad(terms.loss, now)
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)
    torch.testing.assert_close(gradient, -(advantages / lengths / 5)[answer])


def test_the_ratio_of_an_answer_does_not_grow_with_its_length() -> None:
    for length in (1, 10, 1000):
        terms = gspo_loss(
            torch.full((length,), 0.05, dtype=torch.float64),
            torch.zeros(length, dtype=torch.float64),
            torch.zeros(length, dtype=torch.int64),
            torch.ones(1, dtype=torch.float64),
            **CLIP,
            num_answers=1,
        )
        assert terms.ratios.item() == pytest.approx(math.exp(0.05))


def test_all_tokens_of_an_answer_share_one_ratio_and_are_clipped_together() -> None:
    now = torch.tensor([0.0, 0.9], dtype=torch.float64, requires_grad=True)
    old, answer = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    advantages = torch.ones(1, dtype=torch.float64)
    sequence = gspo_loss(now, old, answer, advantages, **CLIP, num_answers=1)
    token = grpo_loss(now, old, answer, advantages, **CLIP, num_answers=1)
    assert torch.autograd.grad(sequence.loss, now)[0].tolist() == [0, 0]
    assert torch.autograd.grad(token.loss, now)[0].tolist() == [-0.5, 0]
    assert (sequence.clipped.item(), token.clipped.item()) == (1.0, 0.5)


@pytest.mark.parametrize("level", LOSSES)
def test_no_gradient_reaches_the_old_policy_or_the_advantages(level: str) -> None:
    now, old, answer, advantages = drawn(0.01)
    old.requires_grad_()
    advantages.requires_grad_()
    LOSSES[level](now, old, answer, advantages, **CLIP, num_answers=5).loss.backward()
    assert now.grad is not None
    assert old.grad is None
    assert advantages.grad is None


@pytest.mark.parametrize("level", LOSSES)
def test_shares_of_micro_batches_add_up_to_the_step(level: str) -> None:
    now, old, answer, advantages = drawn()
    whole = LOSSES[level](now, old, answer, advantages, **CLIP, num_answers=8).loss
    parts = []
    for first, last in ((0, 2), (2, 5)):
        chosen = (answer >= first) & (answer < last)
        parts.append(
            LOSSES[level](
                now[chosen],
                old[chosen],
                answer[chosen] - first,
                advantages[first:last],
                **CLIP,
                num_answers=8,  # three more answers needed no forward
            ).loss
        )
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_the_order_of_tokens_does_not_matter() -> None:
    now, old, answer, advantages = drawn()
    order = torch.randperm(len(now), generator=torch.Generator().manual_seed(3))
    straight = gspo_loss(now, old, answer, advantages, **CLIP, num_answers=5)
    mixed = gspo_loss(now[order], old[order], answer[order], advantages, **CLIP, num_answers=5)
    torch.testing.assert_close(straight.loss, mixed.loss)


def test_log_probabilities_in_float32_keep_their_type() -> None:
    now, old, answer, advantages = drawn()
    terms = gspo_loss(now.float(), old.float(), answer, advantages, **CLIP, num_answers=5)
    assert terms.loss.dtype == terms.ratios.dtype == torch.float32


def test_a_bandit_reaches_its_optimum() -> None:
    """Eight arms of known worth: the policy ends at the best, and the loss alone took it there."""
    worth = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.5, 0.0, 0.8, 0.4], dtype=torch.float64)
    scores = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([scores], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        old = scores.detach().log_softmax(0)
        arms = torch.multinomial(old.exp(), 64, replacement=True, generator=generator)
        noise = 0.1 * torch.randn(64, generator=generator, dtype=torch.float64)
        advantages = group_advantages((worth[arms] + noise).view(4, 16)).flatten()
        for part in range(2):  # two updates on every batch of draws
            chosen = slice(32 * part, 32 * part + 32)
            terms = gspo_loss(
                scores.log_softmax(0)[arms[chosen]],
                old[arms[chosen]],
                torch.arange(32),
                advantages[chosen],
                clip_low=0.2,
                clip_high=0.2,
                num_answers=32,
            )
            optimiser.zero_grad()
            terms.loss.backward()
            optimiser.step()
    assert scores.softmax(0).argmax() == worth.argmax()
    assert scores.softmax(0)[2] > 0.9
