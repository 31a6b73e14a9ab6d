"""Scores of mixtures, how they are compared, and the tables of a search."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cascadevl.data.modality import MODALITIES, Modality

ChooseBy = Literal["loss", "accuracy"]

STAGES: dict[str, str] = {
    "text": "Stage 1: within text",
    "multimodal": "Stage 1: within multimodal data",
    "ratio": "Stage 2: text to multimodal, at a fixed budget",
}
"""Headings of the tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A mixture that is tried.

    Attributes:
        stage: ``"text"`` or ``"multimodal"`` in the first stage, ``"ratio"`` in the second.
        name: Its name within the stage.
        weights: Weights of the data sets within their modality.
        shares: Share of the draws of every data set it trains on.
        ratio: Text to multimodal, in the second stage.
    """

    stage: Literal["text", "multimodal", "ratio"]
    name: str
    weights: dict[str, float]
    shares: dict[str, float]
    ratio: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One training run of a candidate.

    Attributes:
        seed: Its seed.
        steps: Updates done.
        tokens: Tokens seen.
        losses: Held-out loss of every data set, nats a token.
        accuracies: Share of right answers, by data set; only of tasks.
    """

    seed: int
    steps: int
    tokens: int
    losses: dict[str, float]
    accuracies: dict[str, float] = field(default_factory=dict)

    def log_loss(self, modalities: Mapping[str, Modality]) -> float:
        """Mean logarithm of the held-out losses, modalities counting the same.

        The logarithm, because losses of different data sets have different scales: halving any of
        them is worth the same.
        """
        by_modality = [
            [math.log(loss) for name, loss in self.losses.items() if modalities[name] == modality]
            for modality in MODALITIES
        ]
        return statistics.fmean(statistics.fmean(values) for values in by_modality if values)

    def accuracy(self) -> float:
        """Mean share of right answers, data sets counting the same."""
        return statistics.fmean(self.accuracies.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A candidate with its runs.

    Attributes:
        candidate: The candidate.
        trials: One a seed.
        modalities: Modality of every data set.
    """

    candidate: Candidate
    trials: Sequence[Trial]
    modalities: Mapping[str, Modality]

    @property
    def loss(self) -> float:
        """Geometric mean of the held-out losses over data sets and seeds."""
        logs = [trial.log_loss(self.modalities) for trial in self.trials]
        return math.exp(statistics.fmean(logs))

    @property
    def accuracy(self) -> float | None:
        """Mean share of right answers; None where nothing was asked."""
        if not all(trial.accuracies for trial in self.trials):
            return None
        return statistics.fmean(trial.accuracy() for trial in self.trials)

    def costs(self, choose_by: ChooseBy) -> list[float]:
        """What is to be small, of every seed."""
        if choose_by == "loss":
            return [trial.log_loss(self.modalities) for trial in self.trials]
        return [-trial.accuracy() for trial in self.trials]


def best(outcomes: Sequence[Outcome], choose_by: ChooseBy) -> Outcome:
    """The candidate with the best mean over seeds; the first of equals."""
    return min(outcomes, key=lambda outcome: statistics.fmean(outcome.costs(choose_by)))


def lead(outcomes: Sequence[Outcome], choose_by: ChooseBy) -> tuple[str, float, float] | None:
    """How far the best is ahead of the next, compared seed by seed.

    Returns:
        Name of the next, mean difference and its standard error (nan for one seed): of the
        logarithm of the loss, or of the share of right answers. None if there is no other.
    """
    first = best(outcomes, choose_by)
    others = [outcome for outcome in outcomes if outcome is not first]
    if not others:
        return None
    second = best(others, choose_by)
    pairs = zip(first.costs(choose_by), second.costs(choose_by), strict=True)
    differences = [other - own for own, other in pairs]
    error = math.nan
    if len(differences) > 1:
        error = statistics.stdev(differences) / math.sqrt(len(differences))
    return second.candidate.name, statistics.fmean(differences), error


def write_tables(outcomes: Sequence[Outcome], path: Path, choose_by: ChooseBy) -> None:
    """Write the table for people, and beside it the same as JSON.

    Args:
        outcomes: Of all stages.
        path: The Markdown file; the JSON file has its name with another suffix.
        choose_by: What was chosen by.
    """
    stages = [
        [each for each in outcomes if each.candidate.stage == stage]
        for stage in STAGES
        if any(each.candidate.stage == stage for each in outcomes)
    ]
    text = "\n".join(markdown(stage, choose_by) for stage in stages)
    path.write_text(text, "utf-8")
    content = {"choose_by": choose_by, "stages": [_plain(stage, choose_by) for stage in stages]}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def markdown(outcomes: Sequence[Outcome], choose_by: ChooseBy) -> str:
    """The table of one stage.

    Args:
        outcomes: Its candidates.
        choose_by: What was chosen by.
    """
    first = best(outcomes, choose_by)
    names = list(first.candidate.shares)
    asked = [name for name in names if name in first.trials[0].accuracies]
    head = ["candidate", *(f"{name}: share, loss" for name in names), "mean loss"]
    head += [f"{name}: right" for name in asked] + ["right"] * bool(asked) + ["tokens"]
    lines = [f"## {STAGES[first.candidate.stage]}", "", _line(head), _line(["---"] * len(head))]
    for outcome in outcomes:
        mark = " **chosen**" if outcome is first else ""
        shares = outcome.candidate.shares
        cells = [f"{outcome.candidate.name}{mark}"]
        cells += [f"{shares[name]:.3f}, {_mean(outcome, name, 'losses'):.4f}" for name in names]
        cells.append(f"{outcome.loss:.4f}")
        cells += [f"{100 * _mean(outcome, name, 'accuracies'):.1f} %" for name in asked]
        if outcome.accuracy is not None:
            cells.append(f"{100 * outcome.accuracy:.1f} %")
        cells.append(f"{statistics.fmean(t.tokens for t in outcome.trials):,.0f}")
        lines.append(_line(cells))
    return "\n".join([*lines, "", _conclusion(outcomes, choose_by), ""])


def _conclusion(outcomes: Sequence[Outcome], choose_by: ChooseBy) -> str:
    first = best(outcomes, choose_by)
    num_seeds = len(first.trials)
    shares = "Shares are of the draws; losses are nats a token on held-out records, the mean loss "
    shares += f"is geometric, modalities counting the same; mean of {num_seeds} seed(s)."
    ahead = lead(outcomes, choose_by)
    if ahead is None:
        return f"{shares} There was one candidate."
    other, difference, error = ahead
    unit = "% in the mean loss" if choose_by == "loss" else "points of right answers"
    spread = "" if math.isnan(error) else f" (standard error {100 * error:.2f}, paired by seed)"
    return (
        f"{shares} {first.candidate.name} is ahead of {other} by {100 * difference:.2f} "
        f"{unit}{spread}."
    )


def _mean(outcome: Outcome, name: str, what: str) -> float:
    return statistics.fmean(getattr(trial, what)[name] for trial in outcome.trials)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(outcomes: Sequence[Outcome], choose_by: ChooseBy) -> dict[str, Any]:
    ahead = lead(outcomes, choose_by)
    lead_of_best = None
    if ahead is not None:
        name, difference, error = ahead
        spread = None if math.isnan(error) else error
        lead_of_best = {"next": name, "difference": difference, "standard_error": spread}
    return {
        "stage": outcomes[0].candidate.stage,
        "chosen": best(outcomes, choose_by).candidate.name,
        "lead": lead_of_best,
        "candidates": [
            {
                **asdict(outcome.candidate),
                "mean_loss": outcome.loss,
                "accuracy": outcome.accuracy,
                "trials": [asdict(trial) for trial in outcome.trials],
            }
            for outcome in outcomes
        ],
    }
