"""Scores of arms against the visual tokens that they take: tables, curves and budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from experiment import markdown, pooled, written
from flash_rules import RULES
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BEFORE, SMALL_BEFORE = "full, before", "compressed, before"
ALL_FULL, ALL_SMALL = "full, after", "compressed, after"
RESAMPLES = 2000
"""Times that questions are drawn again for an interval."""


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of every arm: score, tokens, and what it keeps of the baseline's score, over all seeds."""
    baseline = [result["arms"][BEFORE] for result in results]
    arms = {}
    for name in results[0]["arms"]:
        runs = [result["arms"][name] for result in results]
        rows = sorted(set(results[0]["rows"]))
        arms[name] = {
            "all": pooled([run["right"] for run in runs]),
            "rows": {row: pooled(of_row(results, runs, row)) for row in rows},
            "tokens": mean_of([run["tokens"] for run in runs])
            / mean_of([run["tokens"] for run in baseline]),
            "kept": retention(
                [r for run in runs for r in run["right"]],
                [r for run in baseline for r in run["right"]],
            ),
        }
    lost = arms[ALL_FULL]["all"]["percent"] - arms[ALL_SMALL]["all"]["percent"]
    return {
        "arms": arms,
        "lost_when_always_compressed": lost,
        "material_counts": lost >= 3,
        "budget_for_99": budget_for(arms, 99.0),
        "router_above_random": above_random(results),
    }


def of_row(
    results: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]], row: str
) -> list[list[bool]]:
    """Right answers to the questions of one family, seed by seed."""
    return [
        [right for right, name in zip(run["right"], result["rows"], strict=True) if name == row]
        for result, run in zip(results, runs, strict=True)
    ]


def mean_of(columns: Sequence[Sequence[int]]) -> float:
    """Mean over all questions of all seeds."""
    values = [value for column in columns for value in column]
    return sum(values) / len(values)


def retention(right: Sequence[bool], baseline: Sequence[bool]) -> dict[str, float]:
    """Percent of the baseline's score that is kept, on the same questions, with its interval."""
    own, other = means_of_pairs(right, baseline)
    return interval(100 * own / np.maximum(other, 1e-9))


def lead(right: Sequence[bool], other: Sequence[bool]) -> dict[str, float]:
    """By how many points one arm is above another on the same questions, with its interval."""
    own, theirs = means_of_pairs(right, other)
    return interval(100 * (own - theirs))


def means_of_pairs(right: Sequence[bool], other: Sequence[bool]) -> np.ndarray:
    """Scores of two arms: the measured ones first, then those of questions drawn again.

    Questions are drawn in pairs, so what makes one hard for both arms does not count.
    """
    both = np.array([right, other], dtype=np.float64)
    generator = np.random.default_rng(0)
    picks = generator.integers(both.shape[1], size=(RESAMPLES, both.shape[1]))
    return np.concatenate([both.mean(1, keepdims=True), both[:, picks].mean(-1)], axis=1)


def interval(values: np.ndarray) -> dict[str, float]:
    """The first value with the 95 % interval of the others."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return {"percent": float(values[0]), "low": float(low), "high": float(high)}


def above_random(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By how many points the router is above chance, share by share, over all seeds."""
    prefix = f"{RULES[0]}, "
    shares = [name.removeprefix(prefix) for name in results[0]["arms"] if name.startswith(prefix)]

    def right(arm: str) -> list[bool]:
        return [value for result in results for value in result["arms"][arm]["right"]]

    return {share: lead(right(f"{prefix}{share}"), right(f"random, {share}")) for share in shares}


def curve(arms: Mapping[str, Any], rule: str) -> list[tuple[float, float, str]]:
    """Share of the visual tokens, percent of the score that is kept, arm; by rising tokens."""
    names = [name for name in arms if name.startswith(f"{rule}, ")]
    points = [(arms[n]["tokens"], arms[n]["kept"]["percent"], n) for n in names]
    ends = [(arms[n]["tokens"], arms[n]["kept"]["percent"], n) for n in (ALL_SMALL, ALL_FULL)]
    return sorted([*points, *ends])


def budget_for(arms: Mapping[str, Any], percent: float) -> dict[str, float | None]:
    """Smallest share of the visual tokens from which on each rule keeps so much of the score.

    Between two points of a curve the score is taken to change evenly.
    """
    found: dict[str, float | None] = {}
    for rule in RULES:
        points = curve(arms, rule)
        found[rule] = None
        for (x0, y0, _), (x1, y1, _) in reversed(list(pairwise(points))):
            if y1 < percent:
                break
            found[rule] = x0 if y0 >= percent else x0 + (x1 - x0) * (percent - y0) / (y1 - y0)
            if y0 < percent:
                break
    return found


def table(summary: Mapping[str, Any]) -> str:
    """The arms as a Markdown table."""
    arms = summary["arms"]
    rows = list(arms[BEFORE]["rows"])
    header = ["", "visual tokens", "kept", "all", "each seed", *rows]
    lines = []
    for name, found in arms.items():
        kept_score = found["kept"]
        lines.append(
            [
                name,
                f"{100 * found['tokens']:.1f} %",
                f"{kept_score['percent']:.1f} ({kept_score['low']:.1f}-{kept_score['high']:.1f})",
                written(found["all"]),
                ", ".join(f"{value:.1f}" for value in found["all"]["seeds"]),
                *[written(found["rows"][row]) for row in rows],
            ]
        )
    return markdown(header, lines)


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Score against visual tokens, one curve a rule."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    arms = summary["arms"]
    for rule in RULES:
        points = curve(arms, rule)
        scores = [arms[name]["all"] for _, _, name in points]
        values = [score["percent"] for score in scores]
        spread = [
            [score["percent"] - score["low"] for score in scores],
            [score["high"] - score["percent"] for score in scores],
        ]
        axes.errorbar(
            [100 * tokens for tokens, _, _ in points], values, yerr=spread, capsize=3, label=rule
        )
    for name, mark in ((BEFORE, "s"), (SMALL_BEFORE, "x")):
        tokens, score = 100 * arms[name]["tokens"], arms[name]["all"]["percent"]
        axes.plot([tokens], [score], mark, color="black", label=name)
    axes.axhline(0.995 * arms[BEFORE]["all"]["percent"], color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("visual tokens, percent of all (dotted: 99.5 % of the baseline's score)")
    axes.set_ylabel("percent right, 95 % interval")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
