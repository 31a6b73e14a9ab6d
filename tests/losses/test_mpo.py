"""MPO: equal to the report by hand, and every line of it has a test that dies with it.

Each test names the mutants it kills: changes of a sign, of beta, of a mean, of a weight, of what
gets a gradient.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reference import mpo_by_hand
from tests.reference.mpo_by_hand import Answer, Pair
from torch import Tensor

from cascadevl.losses.logprobs import sample_sums
from cascadevl.losses.mpo import (
    MPOSettings,
    MPOTerms,
    PairLogprobs,
    RewardShift,
    generation_loss,
    mpo_loss,
    quality_loss,
    rewards,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "mpo.json"
LENGTHS = ((3, 5), (1, 2), (7, 4), (2, 2))
"""Tokens of the chosen and the rejected answer of each pair."""


def draw_pairs(seed: int = 5) -> list[Pair]:
    """Pairs of answers of uneven lengths, a few nats away from the reference."""
    generator = torch.Generator().manual_seed(seed)

    def answer(length: int) -> Answer:
        reference = -torch.rand(length, generator=generator, dtype=torch.float64) * 4
        moved = reference + torch.randn(length, generator=generator, dtype=torch.float64)
        return Answer(moved.tolist(), reference.tolist())

    return [(answer(chosen), answer(rejected)) for chosen, rejected in LENGTHS]


def logprobs_of(pairs: list[Pair], dtype: torch.dtype = torch.float64) -> PairLogprobs:
    def sums(place: int, model: str) -> Tensor:
        return torch.tensor([sum(getattr(pair[place], model)) for pair in pairs], dtype=dtype)

    return PairLogprobs(
        chosen=sums(0, "model").requires_grad_(),
        rejected=sums(1, "model").requires_grad_(),
        reference_chosen=sums(0, "reference").requires_grad_(),
        reference_rejected=sums(1, "reference").requires_grad_(),
        chosen_lengths=torch.tensor([len(pair[0].model) for pair in pairs]),
        rejected_lengths=torch.tensor([len(pair[1].model) for pair in pairs]),
    )


def terms_of(pairs: list[Pair], shift: float = 0.3, **settings: Any) -> MPOTerms:
    return mpo_loss(
        logprobs_of(pairs),
        float(len(pairs)),
        reward_shift=shift,
        settings=MPOSettings(**settings),
    )


@pytest.mark.parametrize("shift", [0.0, 0.3, -0.7])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_equals_the_report_by_hand(shift: float, beta: float) -> None:
    pairs = draw_pairs()
    terms = terms_of(pairs, shift, beta=beta)
    assert terms.loss.item() == pytest.approx(mpo_by_hand.loss(pairs, shift, beta=beta), rel=1e-12)
    count = len(pairs)
    for found, wanted in (
        (terms.preference, sum(mpo_by_hand.preference(p, beta) for p in pairs) / count),
        (terms.quality, sum(mpo_by_hand.quality(p, beta, shift) for p in pairs) / count),
        (terms.generation, sum(mpo_by_hand.generation(p) for p in pairs) / count),
    ):
        assert found.item() == pytest.approx(wanted, rel=1e-12)


def test_the_defaults_are_the_released_values() -> None:
    settings = MPOSettings()
    assert (settings.preference_weight, settings.quality_weight) == (0.8, 0.2)
    assert (settings.generation_weight, settings.beta) == (1.0, 0.1)
    assert settings.preference == "sigmoid"


def test_weights_on_paper() -> None:
    """Kills: a weight left out, or given to another term."""
    pairs = draw_pairs()
    off = {"preference_weight": 0.0, "quality_weight": 0.0, "generation_weight": 0.0}
    whole = terms_of(pairs)
    for name, alone in (
        ("preference_weight", whole.preference),
        ("quality_weight", whole.quality),
        ("generation_weight", whole.generation),
    ):
        assert terms_of(pairs, **{**off, name: 3.0}).loss.item() == pytest.approx(3 * alone.item())
    mixed = 0.8 * whole.preference + 0.2 * whole.quality + 1.0 * whole.generation
    assert whole.loss.item() == pytest.approx(mixed.item())


def test_one_pair_on_paper() -> None:
    """Kills: a sign, beta, the shift's sign, the mean over tokens. All numbers worked by hand."""
    pair = (Answer([-1.0, -2.0], [-2.0, -3.0]), Answer([-4.0], [-3.0]))  # gains +2 and -1
    terms = terms_of([pair], 0.05)
    assert terms.preference.item() == pytest.approx(math.log(1 + math.exp(-0.3)))
    good, bad = math.log(1 + math.exp(-(0.2 - 0.05))), math.log(1 + math.exp(-0.1 - 0.05))
    assert terms.quality.item() == pytest.approx(good + bad)
    assert terms.generation.item() == pytest.approx(1.5)
    assert (terms.reward_chosen.item(), terms.reward_rejected.item()) == pytest.approx((0.2, -0.1))
    assert terms.margin.item() == pytest.approx(0.3)
    assert terms.accuracy.item() == 1.0
    assert terms.kl.item() == pytest.approx(-(2 - 1) / 2)


def test_before_the_first_step_everything_is_known() -> None:
    pairs = [(Answer(c.reference, c.reference), Answer(r.reference, r.reference))
             for c, r in draw_pairs()]  # fmt: skip
    terms = terms_of(pairs, 0.0)
    assert terms.preference.item() == pytest.approx(math.log(2))
    assert terms.quality.item() == pytest.approx(2 * math.log(2))
    assert terms.kl.item() == 0
    assert terms.accuracy.item() == 0  # no reward is higher than the other


def test_gradients_pull_the_right_way() -> None:
    """Kills: a flipped sign anywhere. Generation alone would pull chosen answers up, too."""
    logprobs = logprobs_of(draw_pairs())
    for settings in (
        MPOSettings(quality_weight=0.0, generation_weight=0.0),
        MPOSettings(preference_weight=0.0, generation_weight=0.0),
    ):
        loss = mpo_loss(logprobs, 4.0, reward_shift=0.2, settings=settings).loss
        chosen, rejected = torch.autograd.grad(loss, [logprobs.chosen, logprobs.rejected])
        assert (chosen < 0).all()  # more likely is better
        assert (rejected > 0).all()
    alone = MPOSettings(preference_weight=0.0, quality_weight=0.0)
    loss = mpo_loss(logprobs, 4.0, reward_shift=0.2, settings=alone).loss
    (chosen,) = torch.autograd.grad(loss, [logprobs.chosen])
    torch.testing.assert_close(chosen, -1 / (4 * logprobs.chosen_lengths.double()))


def test_gradient_of_the_preference_on_paper() -> None:
    """Kills: beta outside the sigmoid only, or inside only."""
    pair = (Answer([-1.0], [-2.0]), Answer([-4.0], [-3.0]))  # gains +1 and -1
    logprobs = logprobs_of([pair])
    settings = MPOSettings(quality_weight=0.0, generation_weight=0.0, beta=0.5)
    mpo_loss(logprobs, 1.0, reward_shift=9.0, settings=settings).loss.backward()
    pull = 0.8 * 0.5 / (1 + math.exp(0.5 * 2))
    assert logprobs.chosen.grad is not None
    assert logprobs.rejected.grad is not None
    assert logprobs.chosen.grad.item() == pytest.approx(-pull)
    assert logprobs.rejected.grad.item() == pytest.approx(pull)


def test_nothing_flows_to_the_reference_or_through_what_is_recorded() -> None:
    """Kills: a reference or a metric without its detach."""
    logprobs = logprobs_of(draw_pairs())
    terms = mpo_loss(logprobs, 4.0, reward_shift=0.1, settings=MPOSettings())
    terms.loss.backward()
    assert logprobs.reference_chosen.grad is None
    assert logprobs.reference_rejected.grad is None
    for each in fields(terms):
        assert getattr(terms, each.name).requires_grad == (each.name == "loss"), each.name
    for reward in rewards(logprobs, beta=0.1):
        assert not reward.requires_grad


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_gradient_by_finite_differences(shift: float) -> None:
    fixed = logprobs_of(draw_pairs())

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        moved = replace(fixed, chosen=chosen, rejected=rejected)
        return mpo_loss(moved, 4.0, reward_shift=shift, settings=MPOSettings()).loss

    assert torch.autograd.gradcheck(loss, (fixed.chosen, fixed.rejected))


def test_shares_of_uneven_micro_batches_add_up_to_the_step() -> None:
    """Kills: a mean over the micro-batch instead of the step, in the loss and in every metric."""
    pairs = draw_pairs()
    whole = terms_of(pairs)
    parts = [
        mpo_loss(logprobs_of(part), 4.0, reward_shift=0.3, settings=MPOSettings())
        for part in (pairs[:1], pairs[1:])
    ]
    for each in fields(whole):
        total = sum(getattr(part, each.name).item() for part in parts)
        assert total == pytest.approx(getattr(whole, each.name).item(), rel=1e-12), each.name


def test_generation_is_a_mean_over_tokens_then_over_pairs() -> None:
    """Kills: a mean over the tokens of all pairs, as in TRL's ``sft``, or over all answers."""
    chosen, lengths = torch.tensor([-2.0, -90.0]), torch.tensor([1, 9])
    assert generation_loss(chosen, lengths).tolist() == [2.0, 10.0]
    pairs = [(Answer([-2.0], [0.0]), Answer([-1.0], [0.0])),
             (Answer([-10.0] * 9, [0.0] * 9), Answer([-1.0], [0.0]))]  # fmt: skip
    assert terms_of(pairs).generation.item() == pytest.approx(6.0)  # (2 + 90) / 10 is 9.2


def test_accuracy_and_kl_count_as_they_say() -> None:
    """Kills: accuracy or KL of the wrong sign, or of one kind of answer alone."""
    gains = [(1.0, 0.0), (0.0, 1.0), (2.0, -6.0), (-3.0, -4.0)]
    pairs = [(Answer([c], [0.0]), Answer([r], [0.0])) for c, r in gains]
    terms = terms_of(pairs)
    assert terms.accuracy.item() == 0.75
    assert terms.margin.item() == pytest.approx(0.1 * (1 - 1 + 8 + 1) / 4)
    assert terms.kl.item() == pytest.approx(-(1 + 1 - 4 - 7) / 8)


def test_quality_compares_with_the_shift() -> None:
    """Kills: the shift left out, added, or taken from one side alone."""
    ratios = logprobs_of(draw_pairs()).ratios
    at = {s: quality_loss(ratios, beta=0.1, reward_shift=s) for s in (-1.0, 0.0, 1.0)}
    chosen_only = -torch.nn.functional.logsigmoid(0.1 * ratios.chosen - 1.0)
    rejected_only = -torch.nn.functional.logsigmoid(1.0 - 0.1 * ratios.rejected)
    torch.testing.assert_close(at[1.0], chosen_only + rejected_only)
    assert not torch.isclose(at[1.0], at[0.0]).any()
    assert not torch.isclose(at[1.0], at[-1.0]).any()


def test_the_shift_is_the_mean_of_all_rewards() -> None:
    """Kills: a mean of means, and chosen answers alone."""
    steps = [draw_pairs(seed)[:count] for seed, count in ((1, 4), (2, 1), (3, 3))]
    shift = RewardShift()
    assert shift.value == 0
    for number, pairs in enumerate(steps):
        assert shift.value == pytest.approx(mpo_by_hand.shift_of(steps[:number]), abs=1e-12)
        chosen, rejected = rewards(logprobs_of(pairs), beta=0.1)
        shift = shift.after(float(chosen.sum() + rejected.sum()), 2.0 * len(pairs))
    assert shift.value == pytest.approx(mpo_by_hand.shift_of(steps))
    assert shift.count == 16


def test_far_away_pairs_stay_finite() -> None:
    far = (Answer([-5000.0], [0.0]), Answer([0.0], [-5000.0]))
    logprobs = logprobs_of([far], torch.float32)
    terms = mpo_loss(logprobs, 1.0, reward_shift=0.0, settings=MPOSettings())
    terms.loss.backward()
    assert terms.loss.isfinite()
    assert logprobs.chosen.grad is not None
    assert logprobs.chosen.grad.isfinite().all()


def golden() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return loaded


def of_golden(case: dict[str, Any]) -> tuple[PairLogprobs, list[Tensor]]:
    """The pairs of a case, and the tokens' log-probabilities that gradients are taken of."""
    tokens = [torch.tensor(answer, dtype=torch.float64) for answer in case["answers"]]
    leaves = [answer.requires_grad_() for answer in tokens]
    samples = torch.repeat_interleave(torch.tensor([len(answer) for answer in tokens]))
    sums = sample_sums(torch.cat(leaves), samples, len(tokens))
    lengths = torch.tensor([len(answer) for answer in tokens])
    half = len(tokens) // 2  # chosen answers first, as TRL has them
    reference = torch.tensor(case["reference"], dtype=torch.float64)
    return (
        PairLogprobs(
            chosen=sums[:half],
            rejected=sums[half:],
            reference_chosen=reference[:half],
            reference_rejected=reference[half:],
            chosen_lengths=lengths[:half],
            rejected_lengths=lengths[half:],
        ),
        leaves,
    )


@pytest.mark.parametrize("case", golden()["mpo"], ids=lambda case: case["name"])
def test_equals_trl(case: dict[str, Any]) -> None:
    """Where TRL's BCO has no shift either, and its ``sft`` counts one pair at a time."""
    logprobs, leaves = of_golden(case)
    names = ("preference_weight", "quality_weight", "generation_weight")
    settings = MPOSettings(**dict(zip(names, case["weights"], strict=True)), beta=case["beta"])
    terms = mpo_loss(logprobs, float(len(logprobs.chosen)), reward_shift=0.0, settings=settings)
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(case["loss"], abs=1e-9)
    for leaf, wanted in zip(leaves, case["gradients"], strict=True):
        torch.testing.assert_close(
            leaf.grad, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-9
        )
    recorded = case["metrics"]
    assert terms.margin.item() == pytest.approx(recorded["rewards/margins"], abs=1e-9)
    assert terms.accuracy.item() == pytest.approx(recorded["rewards/accuracies"], abs=1e-6)
