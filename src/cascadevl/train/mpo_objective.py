"""What a step of MPO minimises, and the reward shift that it carries from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cascadevl.data.pairs import PairBatch
from cascadevl.losses.mpo import MPOSettings, MPOTerms, PairLogprobs, RewardShift, mpo_loss, rewards
from cascadevl.model.adapters import adapters_off
from cascadevl.train.logprobs import answer_lengths, answer_logprobs
from cascadevl.train.loop import total
from cascadevl.train.objective import Objective, Terms


class ShiftMemory:
    """The reward shift of a run (docs/decisions/0022).

    A step uses the mean of the rewards of all steps before it, and is taken into that mean once,
    by all processes alike, when it has been applied. With ``before_use``, as in the public code,
    every micro-batch is taken in before it is compared with the mean.

    Attributes:
        shift: The mean so far.
        before_use: Whether rewards are taken in before they are used.
    """

    def __init__(self, *, before_use: bool = False) -> None:
        """Start without rewards."""
        self.shift = RewardShift()
        self.before_use = before_use

    def advance(self, metrics: Mapping[str, float]) -> None:
        """Take in the rewards of a step, unless its micro-batches did it one by one."""
        if not self.before_use:
            mean_of_pairs = metrics["reward_chosen"] + metrics["reward_rejected"]
            self.shift = self.shift.after(mean_of_pairs * metrics["pairs"], 2 * metrics["pairs"])

    def state_dict(self) -> dict[str, Any]:
        """Sum and number of the rewards."""
        return asdict(self.shift)

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Go on with the rewards of a state."""
        self.shift = RewardShift(**state)


def mpo_objective(
    settings: MPOSettings, memory: ShiftMemory, accelerator: Accelerator
) -> Objective[PairBatch]:
    """Mixed preference optimisation of pairs (InternVL3 report, section 2.4).

    A step weighs as many as its pairs are, so each term is a mean over them.

    Args:
        settings: Weights and forms of the terms.
        memory: The reward shift.
        accelerator: The processes whose rewards are one mean.
    """

    def loss(model: nn.Module, batch: PairBatch, num_pairs: float) -> Terms:
        logprobs = pair_logprobs(model, batch)
        if memory.before_use:
            seen = torch.cat(rewards(logprobs, beta=settings.beta)).double()
            sums = total(accelerator, [float(seen.sum()), float(len(seen))])
            memory.shift = memory.shift.after(*sums)
        shift = memory.shift.value
        terms = mpo_loss(logprobs, num_pairs, reward_shift=shift, settings=settings)
        pairs = terms.loss.new_tensor(float(len(batch.sources)))
        return Terms(terms.loss, recorded(terms, pairs, shift * pairs / num_pairs))

    return Objective(weigh=lambda batch: float(len(batch.sources)), loss=loss)


def pair_logprobs(model: nn.Module, batch: PairBatch) -> PairLogprobs:
    """Log-probabilities of the answers of some pairs under the model and under its reference.

    Args:
        model: The model in training. Where the batch brings no reference, it is asked again with
            its adapters off.
        batch: The pairs.
    """
    samples = answer_logprobs(model, batch.packed)
    reference = batch.reference
    if reference is None:
        with adapters_off(model), torch.no_grad():
            base = answer_logprobs(model, batch.packed)
        reference = torch.stack([base[batch.chosen], base[batch.rejected]])
    lengths = answer_lengths(batch.packed)
    return PairLogprobs(
        chosen=samples[batch.chosen],
        rejected=samples[batch.rejected],
        reference_chosen=reference[0],
        reference_rejected=reference[1],
        chosen_lengths=lengths[batch.chosen],
        rejected_lengths=lengths[batch.rejected],
    )


def recorded(terms: MPOTerms, pairs: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """The values of a step worth recording, by name, but for its loss.

    Args:
        terms: The batch's shares.
        pairs: Its number of pairs.
        shift: Its share of the reward shift.
    """
    names = [each.name for each in fields(terms) if each.name != "loss"]
    values = {name: getattr(terms, name) for name in names}
    return {**values, "reward_shift": shift, "pairs": pairs}
