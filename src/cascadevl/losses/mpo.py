"""Mixed preference optimisation: which answer is better, how good each is, and how to write it.

InternVL3 report, section 2.4, and arXiv 2411.10442: ``L = w_p L_p + w_q L_q + w_g L_g``.

- Preference: ``L_p = -log sigma(r_c - r_r)`` (DPO), with ``r = beta log(pi(y|x) / pi_0(y|x))``.
- Quality: ``L_q = -log sigma(r_c - delta) - log sigma(-(r_r - delta))`` (BCO). The reward shift
  delta is the mean of all rewards seen before this step (docs/decisions/0022).
- Generation: ``L_g = -log pi(y_c|x) / |y_c|``.

Log-probabilities are summed over an answer's tokens. Each term is a mean over the pairs of the
whole step, whose number a pure function cannot see: the caller passes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import logsigmoid

from cascadevl.losses.preference import LogRatios, Preference, preference_loss


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairLogprobs:
    """Log-probabilities of the answers of some pairs, each summed over its tokens.

    Attributes:
        chosen: Of the chosen answers under the model in training.
        rejected: Of the rejected answers.
        reference_chosen: Of the chosen answers under the reference; no gradient reaches it.
        reference_rejected: Of the rejected answers under the reference.
        chosen_lengths: Tokens of each chosen answer, its end of turn counted.
        rejected_lengths: Tokens of each rejected answer.
    """

    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " pairs"]
    reference_chosen: Float[Tensor, " pairs"]
    reference_rejected: Float[Tensor, " pairs"]
    chosen_lengths: Int64[Tensor, " pairs"]
    rejected_lengths: Int64[Tensor, " pairs"]

    @property
    def ratios(self) -> LogRatios:
        """How much more likely than under the reference the answers are."""
        return LogRatios(
            chosen=self.chosen - self.reference_chosen.detach(),
            rejected=self.rejected - self.reference_rejected.detach(),
            chosen_lengths=self.chosen_lengths,
            rejected_lengths=self.rejected_lengths,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MPOSettings:
    """How the three terms are weighed and formed.

    Attributes:
        preference_weight: w_p.
        quality_weight: w_q.
        generation_weight: w_g.
        beta: How strongly the model is held to the reference.
        preference: The form of the preference term (`cascadevl.losses.preference.VARIANTS`).
        label_smoothing: Share of pairs taken to be labelled the wrong way round, for the forms
            that allow for it.
    """

    preference_weight: float = 0.8  # released MPO scripts, and arXiv 2411.10442
    quality_weight: float = 0.2  # the same
    generation_weight: float = 1.0  # the same
    beta: float = 0.1  # the same
    preference: Preference = "sigmoid"
    label_smoothing: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardShift:
    """The mean of all rewards so far, chosen and rejected alike: BCO's delta.

    The public code keeps the same cumulative mean, where the InternVL3 report says moving average.

    Attributes:
        total: Sum of the rewards.
        count: How many there were.
    """

    total: float = 0.0
    count: float = 0.0

    @property
    def value(self) -> float:
        """The shift; 0 before the first step, when every reward is 0."""
        return self.total / self.count if self.count else 0.0

    def after(self, total: float, count: float) -> RewardShift:
        """The shift once some more rewards were seen.

        Args:
            total: Their sum, over all processes.
            count: How many they are.
        """
        return RewardShift(total=self.total + total, count=self.count + count)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MPOTerms:
    """One batch's shares of what a step comes to; the shares of its batches add up.

    Attributes:
        loss: The weighted sum of the three terms, the only one with a gradient.
        preference: L_p.
        quality: L_q.
        generation: L_g.
        reward_chosen: Mean reward of the chosen answers.
        reward_rejected: Mean reward of the rejected answers.
        margin: Mean of their difference.
        accuracy: Share of pairs whose chosen answer has the higher reward.
        kl: ``KL(pi_0 || pi)`` in nats an answer, as far as the pairs' answers are samples of the
            reference: the mean of ``log pi_0(y|x) - log pi(y|x)``. It falls below 0 where the
            answers, which are selected, became more likely than the reference had them.
    """

    loss: Float[Tensor, ""]
    preference: Float[Tensor, ""]
    quality: Float[Tensor, ""]
    generation: Float[Tensor, ""]
    reward_chosen: Float[Tensor, ""]
    reward_rejected: Float[Tensor, ""]
    margin: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]
    kl: Float[Tensor, ""]


def quality_loss(ratios: LogRatios, *, beta: float, reward_shift: float) -> Float[Tensor, " pairs"]:
    """BCO of each pair: a good answer's reward belongs above the shift, a bad one's below.

    Args:
        ratios: What the model made of both answers.
        beta: Scale of the rewards.
        reward_shift: What rewards are compared with; a number, so that no gradient reaches it.
    """
    chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
    return -logsigmoid(chosen - reward_shift) - logsigmoid(-(rejected - reward_shift))


def generation_loss(
    chosen: Float[Tensor, " pairs"], lengths: Int64[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """Negative log-likelihood a token of each chosen answer.

    Args:
        chosen: Log-probability of each chosen answer.
        lengths: Its tokens.
    """
    return -chosen / lengths


def rewards(
    logprobs: PairLogprobs, *, beta: float
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """``beta log(pi / pi_0)`` of the chosen and the rejected answers, without gradient."""
    ratios = logprobs.ratios
    return beta * ratios.chosen.detach(), beta * ratios.rejected.detach()


def mpo_loss(
    logprobs: PairLogprobs, num_pairs: float, *, reward_shift: float, settings: MPOSettings
) -> MPOTerms:
    """This batch's share of the step's loss, and of what is worth recording.

    Args:
        logprobs: Log-probabilities of the batch's pairs.
        num_pairs: Pairs of the whole step, over all micro-batches and all ranks.
        reward_shift: BCO's delta (`RewardShift`).
        settings: Weights and forms.
    """
    ratios, beta = logprobs.ratios, settings.beta
    preferences = preference_loss(
        ratios,
        beta=beta,
        preference=settings.preference,
        label_smoothing=settings.label_smoothing,
    )
    preference = preferences.sum() / num_pairs
    quality = quality_loss(ratios, beta=beta, reward_shift=reward_shift).sum() / num_pairs
    generation = generation_loss(logprobs.chosen, logprobs.chosen_lengths).sum() / num_pairs
    chosen, rejected = rewards(logprobs, beta=beta)
    return MPOTerms(
        loss=settings.preference_weight * preference
        + settings.quality_weight * quality
        + settings.generation_weight * generation,
        preference=preference.detach(),
        quality=quality.detach(),
        generation=generation.detach(),
        reward_chosen=chosen.sum() / num_pairs,
        reward_rejected=rejected.sum() / num_pairs,
        margin=(chosen - rejected).sum() / num_pairs,
        accuracy=(chosen > rejected).to(chosen.dtype).sum() / num_pairs,
        kl=-(ratios.chosen + ratios.rejected).detach().sum() / (2 * num_pairs),
    )
