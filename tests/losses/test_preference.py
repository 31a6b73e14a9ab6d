"""The forms of the preference term: by hand, by TRL, and by what they are meant to do."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from tests.losses.test_mpo import draw_pairs, golden, logprobs_of, of_golden
from tests.reference import mpo_by_hand
from torch import Tensor

from cascadevl.losses.preference import VARIANTS, LogRatios, Preference, preference_loss

SMOOTHING = {"smoothed": 0.2, "robust": 0.2, "exo_pair": 0.01}


def test_every_name_is_a_form() -> None:
    assert set(VARIANTS) == set(get_args(Preference))


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("preference", VARIANTS)
def test_each_form_equals_itself_by_hand(preference: Preference, beta: float) -> None:
    pairs, flipped = draw_pairs(), SMOOTHING.get(preference, 0.0)
    found = preference_loss(
        logprobs_of(pairs).ratios, beta=beta, preference=preference, label_smoothing=flipped
    )
    wanted = [mpo_by_hand.preference(pair, beta, preference, flipped) for pair in pairs]
    torch.testing.assert_close(
        found.detach(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("case", golden()["preference"], ids=lambda case: case["name"])
def test_each_form_equals_trls(case: dict[str, Any]) -> None:
    logprobs, leaves = of_golden(case)
    losses = preference_loss(
        logprobs.ratios,
        beta=case["beta"],
        preference=case["preference"],
        label_smoothing=case["label_smoothing"],
    )
    losses.mean().backward()
    close = 1e-6 if case["preference"] == "exo_pair" else 1e-9  # TRL has EXO's constant in float32
    assert losses.mean().item() == pytest.approx(case["loss"], abs=close)
    for leaf, wanted in zip(leaves, case["gradients"], strict=True):
        torch.testing.assert_close(
            leaf.grad, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=close
        )


@pytest.mark.parametrize("preference", VARIANTS)
def test_gradient_by_finite_differences(preference: Preference) -> None:
    fixed = logprobs_of(draw_pairs()).ratios

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        ratios = LogRatios(
            chosen=chosen,
            rejected=rejected,
            chosen_lengths=fixed.chosen_lengths,
            rejected_lengths=fixed.rejected_lengths,
        )
        flipped = SMOOTHING.get(preference, 0.0)
        return preference_loss(
            ratios, beta=0.1, preference=preference, label_smoothing=flipped
        ).sum()

    leaves = (
        fixed.chosen.detach().requires_grad_(),
        fixed.rejected.detach().requires_grad_(),
    )
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("preference", [name for name in VARIANTS if name != "apo_down"])
def test_a_pair_that_was_told_apart_costs_less(preference: Preference) -> None:
    """`apo_down` pulls chosen answers down on purpose, so it is not of this kind."""
    lengths = torch.tensor([4])
    gains = [(-1.0, 1.0), (0.0, 0.0), (1.0, -1.0)]
    losses = [
        preference_loss(
            LogRatios(
                chosen=torch.tensor([chosen]),
                rejected=torch.tensor([rejected]),
                chosen_lengths=lengths,
                rejected_lengths=lengths,
            ),
            beta=0.1,
            preference=preference,
            label_smoothing=SMOOTHING.get(preference, 0.0),
        ).item()
        for chosen, rejected in gains
    ]
    assert losses[0] > losses[1] > losses[2]
