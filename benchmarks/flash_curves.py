"""Scores of arms against the visual tokens that they take: tables, curves, leads and budgets.

All arms answer the same questions. So intervals are drawn over questions for all arms together:
what makes a question hard for two of them does not count when they are compared. Questions are
drawn again within each seed and family, whose numbers are fixed. What another seed of training
would change is not in the intervals; the scores of the seeds stand beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from experiment import markdown, pooled, written
from flash_rules import RULES
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BEFORE, SMALL_BEFORE = "full, before", "compressed, before"
ALL_FULL, ALL_SMALL = "full, after", "compressed, after"

RESAMPLES = 2000
"""Times that questions are drawn again for an interval."""

KEPT = (99.0, 99.5)
"""Percents of the baseline's score for which the smallest budget is looked for."""

LEAST_LOSS = 3.0
"""Points that always compressing has to cost for the material to count."""


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """Scores and tokens of all arms: as measured first, then of questions drawn again.

    Attributes:
        score: Of each arm, percents of right answers.
        tokens: Of each arm, its visual tokens as a share of the baseline's.
    """

    score: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, results: Sequence[Mapping[str, Any]]) -> Draws:
        """Draw the questions of all seeds again.

        Args:
            results: Of each seed.
        """
        weights = resampled([result["rows"] for result in results])

        def means(arm: str, what: str) -> np.ndarray:
            values = [value for result in results for value in result["arms"][arm][what]]
            found: np.ndarray = weights @ np.array(values, dtype=np.float64) / len(values)
            return found

        names = list(results[0]["arms"])
        whole = means(BEFORE, "tokens")
        return cls(
            score={name: 100 * means(name, "right") for name in names},
            tokens={name: means(name, "tokens") / whole for name in names},
        )

    def curve(self, rule: str, number: int) -> list[tuple[float, float]]:
        """Tokens and score of a rule's arms in one of the draws, by rising tokens.

        Both ends are those of the model without a choice: all tiles compressed, all full.

        Args:
            rule: One of `RULES`; behind the name of a run and a colon where arms have one.
            number: Of the draw; 0 is what was measured.
        """
        run = "".join(rule.rpartition(": ")[:2])
        arms = [*arms_of(rule, self.score), run + ALL_SMALL, run + ALL_FULL]
        return sorted((self.tokens[arm][number], self.score[arm][number]) for arm in arms)


def resampled(rows: Sequence[Sequence[str]]) -> np.ndarray:
    """How often every question counts: once each, then as they are drawn again, line by line.

    Args:
        rows: Of each seed, the family of each of its questions, families one after the other.
    """
    generator = np.random.default_rng(0)
    sizes = [len(list(group)) for each in rows for _, group in groupby(each)]
    drawn = [generator.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) for n in sizes]
    return np.concatenate([np.ones((1, sum(sizes))), np.concatenate(drawn, axis=1)])


def arms_of(rule: str, names: Mapping[str, Any]) -> list[str]:
    """The arms of a rule, one for each share."""
    return [name for name in names if name.startswith(f"{rule}, ")]


def interval(values: np.ndarray) -> dict[str, float | None]:
    """The first value with the 95 % interval of the others; None stands for no finite value."""
    low = np.quantile(values[1:], 0.025, method="lower")
    high = np.quantile(values[1:], 0.975, method="higher")
    found = {"value": values[0], "low": low, "high": high}
    return {name: float(x) if np.isfinite(x) else None for name, x in found.items()}


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all seeds come to: arms, what compressing costs, leads at equal tokens, budgets.

    Args:
        results: Of each seed: the family of every question; arm by arm, right answers and tokens.
    """
    draws = Draws.of(results)
    lost = interval(draws.score[ALL_FULL] - draws.score[ALL_SMALL])
    return {
        "arms": {name: arm(name, results, draws) for name in draws.score},
        "lost_when_always_compressed": lost,
        "material_counts": (lost["value"] or 0.0) >= LEAST_LOSS,
        "leads": {
            f"{rule} over {other}": leads(draws, rule, other)
            for rule, other in ((RULES[0], each) for each in RULES[1:])
        },
        "budgets": {
            f"{percent:g}": {rule: budget(draws, rule, percent) for rule in RULES}
            for percent in KEPT
        },
    }


def arm(name: str, results: Sequence[Mapping[str, Any]], draws: Draws) -> dict[str, Any]:
    """Score, tokens, and what is kept of the baseline's score, of all seeds and each."""
    runs = [result["arms"][name] for result in results]
    baseline = [result["arms"][BEFORE] for result in results]
    families = list(dict.fromkeys(results[0]["rows"]))
    return {
        "all": pooled([run["right"] for run in runs]),
        "rows": {row: pooled(of_row(results, runs, row)) for row in families},
        "tokens": float(draws.tokens[name][0]),
        "kept": interval(share_kept(draws, name)),
        "kept_by_seed": [
            100 * sum(run["right"]) / max(sum(base["right"]), 1)
            for run, base in zip(runs, baseline, strict=True)
        ],
    }


def share_kept(draws: Draws, name: str) -> np.ndarray:
    """What an arm keeps of the baseline's score in each draw, in percent."""
    kept: np.ndarray = 100 * draws.score[name] / np.maximum(draws.score[BEFORE], 1e-9)
    return kept


def of_row(
    results: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]], row: str
) -> list[list[bool]]:
    """Right answers to the questions of one family, seed by seed."""
    return [
        [right for right, name in zip(run["right"], result["rows"], strict=True) if name == row]
        for result, run in zip(results, runs, strict=True)
    ]


def leads(draws: Draws, rule: str, other: str) -> dict[str, dict[str, float | None]]:
    """By how many points a rule is above another that has as many visual tokens, arm by arm.

    The other rule's score is taken to change evenly between two of its points.

    Args:
        draws: Of all arms.
        rule: The one.
        other: The other.
    """
    numbers = range(RESAMPLES + 1)
    curves = [tuple(zip(*draws.curve(other, number), strict=True)) for number in numbers]
    found = {}
    for name in arms_of(rule, draws.score):
        theirs = [np.interp(draws.tokens[name][n], *curves[n]) for n in numbers]
        lead = interval(draws.score[name] - np.array(theirs))
        found[name] = {"tokens": float(draws.tokens[name][0]), **lead}
    return found


def budget(draws: Draws, rule: str, percent: float) -> dict[str, float | None]:
    """Smallest share of the visual tokens from which on a rule keeps so much of the baseline.

    Args:
        draws: Of all arms.
        rule: One of `RULES`.
        percent: Of the baseline's score.
    """
    values = [
        smallest(draws.curve(rule, number), draws.score[BEFORE][number] * percent / 100)
        for number in range(RESAMPLES + 1)
    ]
    return interval(np.array(values))


def smallest(points: Sequence[tuple[float, float]], score: float) -> float:
    """Where a curve comes to a score for good; infinity where it never does.

    Between two points the score is taken to change evenly.

    Args:
        points: Tokens and score, by rising tokens.
        score: To be reached.
    """
    tokens, last = points[-1]
    if last < score:
        return float("inf")
    for (x0, y0), (x1, y1) in reversed(list(pairwise(points))):
        if y0 < score:
            return x0 + (x1 - x0) * (score - y0) / (y1 - y0)
        tokens = x0
    return tokens


def tables(summary: Mapping[str, Any]) -> str:
    """Arms, leads and budgets as Markdown tables."""
    lost = summary["lost_when_always_compressed"]
    counts = "counts" if summary["material_counts"] else "does not count"
    return (
        f"{table(summary['arms'], summary['guessing'])}\n"
        f"Always compressing costs {between(lost)} points after consistency; the material "
        f"{counts}.\n"
        f"\nPoints ahead at equal visual tokens:\n\n{lead_table(summary['leads'])}\n"
        f"Percent of the visual tokens with which a share of the score is kept:\n\n"
        f"{budget_table(summary['budgets'])}"
    )


def between(found: Mapping[str, float | None], scale: float = 1.0) -> str:
    """A value with its interval; a dash for what there is not."""
    value, low, high = (
        "-" if found[name] is None else f"{scale * found[name]:.1f}"
        for name in ("value", "low", "high")
    )
    return f"{value} ({low} to {high})"


def table(arms: Mapping[str, Any], guessing: Mapping[str, float]) -> str:
    """One line an arm, below what the most frequent answer of each family comes to."""
    rows = list(arms[BEFORE]["rows"])
    header = ["", "visual tokens, %", "kept, %", "each seed", "right, %", *rows]
    lines = [
        [
            name,
            f"{100 * found['tokens']:.1f}",
            between(found["kept"]),
            ", ".join(f"{value:.1f}" for value in found["kept_by_seed"]),
            written(found["all"]),
            *[written(found["rows"][row]) for row in rows],
        ]
        for name, found in arms.items()
    ]
    guessed = ["most frequent answer", "0", "", "", "", *(f"{guessing[row]:.1f}" for row in rows)]
    return markdown(header, [guessed, *lines])


def lead_table(found: Mapping[str, Any]) -> str:
    """One line a pair of rules."""
    shares = [name.rpartition(", ")[2] for name in next(iter(found.values()))]
    lines = [
        [
            pair,
            *(f"{between(each)} at {100 * each['tokens']:.0f} % tokens" for each in arms.values()),
        ]
        for pair, arms in found.items()
    ]
    return markdown(["", *(f"{100 * float(share):.0f} % of tiles" for share in shares)], lines)


def budget_table(found: Mapping[str, Any]) -> str:
    """One line a share of the score."""
    lines = [
        [f"{percent} %", *(between(each, 100) for each in rules.values())]
        for percent, rules in found.items()
    ]
    return markdown(["kept", *RULES], lines)


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """What is kept of the baseline's score against visual tokens, one curve a rule."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    arms = summary["arms"]
    for rule in RULES:
        plot(axes, [arms[n] for n in [*arms_of(rule, arms), ALL_SMALL, ALL_FULL]], label=rule)
    for name, mark in ((BEFORE, "s"), (ALL_SMALL, "o"), (SMALL_BEFORE, "x")):
        point = (100 * arms[name]["tokens"], arms[name]["kept"]["value"])
        axes.plot(*point, mark, color="black", label=name)
    axes.axhline(99.5, color="grey", linewidth=0.8, linestyle=":")
    axes.axvline(50, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("visual tokens, percent of all (dotted: half of them)")
    axes.set_ylabel("percent of the baseline's score (dotted: 99.5)")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def plot(axes: Axes, arms: Sequence[Mapping[str, Any]], **style: Any) -> None:
    """Draw what arms keep against their tokens, with intervals, as one curve.

    Args:
        axes: Where.
        arms: Their ``tokens`` and ``kept``, in any order.
        style: Of the curve, as matplotlib's ``errorbar`` takes it.
    """
    found = sorted(arms, key=lambda each: each["tokens"])
    kept = [each["kept"] for each in found]
    spread = [
        [max(0.0, each["value"] - each["low"]) for each in kept],
        [max(0.0, each["high"] - each["value"]) for each in kept],
    ]
    tokens, values = [100 * each["tokens"] for each in found], [each["value"] for each in kept]
    axes.errorbar(tokens, values, yerr=spread, capsize=3, **style)
