"""What comes out of best of N: the ways to choose, their scores with intervals, tables and curves.

The answers to a question are dealt into hands of N; a question's score is the share of its hands
from which a right answer is chosen, so that all answers count at every N. Intervals are those of
questions drawn again, all hands of a question together, over all seeds; they do not cover what
another seed of training would change, which is shown seed by seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from experiment import markdown, signed
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cascadevl.scoring.steps import aggregated, best_threshold, macro_f1
from cascadevl.scoring.voting import tally

NUMBERS = (2, 4, 8, 16, 32)
RESAMPLES = 4000

Question: TypeAlias = Mapping[str, Any]
"""The answers to a question: a list each of what is known of them."""

Hand: TypeAlias = Sequence[int]
"""Places of some answers."""


def by_vote(asked: Question, hand: Hand) -> int:
    """The first answer that says what most of them say."""
    votes = tally([asked["votes"][n] for n in hand])
    return _first(asked, hand, votes[0][0]) if votes else hand[0]


def by_weighted_vote(asked: Question, hand: Hand) -> int:
    """The first answer that says what the process reward of all who say it speaks for most."""
    weights: dict[str, float] = {}
    for n in hand:
        if (vote := asked["votes"][n]) is not None:
            weights[vote] = weights.get(vote, 0.0) + aggregated(asked["PRM"][n])
    return _first(asked, hand, max(weights, key=lambda vote: weights[vote])) if weights else hand[0]


def _first(asked: Question, hand: Hand, vote: str) -> int:
    return next(n for n in hand if asked["votes"][n] == vote)


def _best(asked: Question, hand: Hand, score: Callable[[int], float]) -> int:
    """The highest score of those that came to an end, the first of equals."""
    return max(hand, key=lambda n: (asked["ended"][n], score(n)))


CHOICES: Mapping[str, Callable[[Question, Hand], int]] = {
    "vote": by_vote,
    "likelihood": lambda asked, hand: _best(asked, hand, lambda n: asked["likelihood"][n]),
    "ORM": lambda asked, hand: _best(asked, hand, lambda n: aggregated(asked["ORM"][n])),
    "PRM": lambda asked, hand: _best(asked, hand, lambda n: aggregated(asked["PRM"][n])),
    "PRM, its lowest step": lambda asked, hand: _best(
        asked, hand, lambda n: aggregated(asked["PRM"][n], "min")
    ),
    "PRM, its last step": lambda asked, hand: _best(
        asked, hand, lambda n: aggregated(asked["PRM"][n], "last")
    ),
    "vote weighted by PRM": by_weighted_vote,
}


def hands(num_samples: int, size: int) -> list[range]:
    """All answers in hands of that size."""
    return [range(first, first + size) for first in range(0, num_samples - size + 1, size)]


def share_right(asked: Question, arm: str, size: int) -> float:
    """In how many hands of that size a right answer is chosen, as a share of them.

    Args:
        asked: The question.
        arm: One of `CHOICES`, or ``oracle``, which finds a right answer wherever one is.
        size: N.
    """
    right = asked["right"]
    dealt = hands(len(right), size)
    if arm == "oracle":
        found = [any(right[n] for n in hand) for hand in dealt]
    else:
        found = [right[CHOICES[arm](asked, hand)] for hand in dealt]
    return sum(found) / len(found)


def resampled(values: Sequence[float]) -> dict[str, float]:
    """A mean in percent with its 95 % interval, of questions drawn again."""
    column = np.array(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(len(column), size=(RESAMPLES, len(column)))
    low, high = np.percentile(column[picks].mean(axis=1), [2.5, 97.5]).tolist()
    return {"percent": 100 * float(column.mean()), "low": 100 * low, "high": 100 * high}


def numbers_of(results: Sequence[Mapping[str, Any]]) -> list[int]:
    """N, as far as so many answers were drawn."""
    exam = next(iter(results[0]["exams"].values()))
    return [number for number in NUMBERS if number <= len(exam[0]["right"])]


def columns_of(result: Mapping[str, Any], temperature: str) -> dict[str, list[float]]:
    """Of every arm and N, the share of right hands of each question of a seed."""
    asked = result["exams"][temperature]
    found = {"pass@1": [sum(each["right"]) / len(each["right"]) for each in asked]}
    found |= {mode: [float(right) for right in values] for mode, values in result["greedy"].items()}
    for number in numbers_of([result]):
        for arm in (*CHOICES, "oracle"):
            found[f"{arm} @{number}"] = [share_right(each, arm, number) for each in asked]
    return found


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of every arm over all seeds, and by how much the process reward is above others."""
    numbers = numbers_of(results)
    summary: dict[str, Any] = {"temperatures": {}, "numbers": numbers}
    for temperature in results[0]["exams"]:
        seeds = [columns_of(result, temperature) for result in results]
        every = {arm: [v for seed in seeds for v in seed[arm]] for arm in seeds[0]}
        scores = {
            arm: {**resampled(values), "seeds": [100 * float(np.mean(s[arm])) for s in seeds]}
            for arm, values in every.items()
        }
        leads = {
            other: {
                str(number): _lead(every, f"PRM @{number}", _at(other, number))
                for number in numbers
            }
            for other in ("vote", "likelihood", "ORM", "pass@1", "thinking")
        }
        apart = {
            other: {
                str(n): scores[f"PRM @{n}"]["low"] > scores[_at(other, n)]["high"] for n in numbers
            }
            for other in ("vote", "pass@1", "thinking")
        }
        summary["temperatures"][temperature] = {
            "scores": scores,
            "PRM above": leads,
            "intervals apart": apart,
            "kinds": _kinds(results, temperature, seeds, min(8, numbers[-1])),
        }
    for name in ("data", "cost_s"):
        summary[name] = [result[name] for result in results]
    summary["steps"] = [step_scores(result) for result in results]
    return summary


def _at(arm: str, number: int) -> str:
    return arm if arm in ("pass@1", "thinking", "base") else f"{arm} @{number}"


def _lead(every: Mapping[str, Sequence[float]], arm: str, other: str) -> dict[str, float]:
    """By how many points an arm is above another on the same questions."""
    pairs = zip(every[arm], every[other], strict=True)
    return resampled([one - two for one, two in pairs])


def _kinds(
    results: Sequence[Mapping[str, Any]],
    temperature: str,
    seeds: Sequence[Mapping[str, Sequence[float]]],
    number: int,
) -> dict[str, dict[str, float]]:
    """Percent right of some arms, kind by kind."""
    kinds = [each["kind"] for result in results for each in result["exams"][temperature]]
    arms = ("pass@1", f"vote @{number}", f"PRM @{number}", f"oracle @{number}")
    found: dict[str, dict[str, float]] = {}
    for kind in sorted(set(kinds)):
        found[kind] = {}
        for arm in arms:
            values = [v for seed in seeds for v in seed[arm]]
            own = [v for v, each in zip(values, kinds, strict=True) if each == kind]
            found[kind][arm] = 100 * sum(own) / len(own)
    return found


def step_scores(result: Mapping[str, Any]) -> dict[str, Any]:
    """Macro-F1 of single steps: with planted errors, and of the answers that were drawn.

    The threshold is that of other solutions with planted errors. Beside each stands what calling
    every step right would score.
    """
    parts = result["planted"]
    threshold, _ = best_threshold(parts["chosen"]["scores"], parts["chosen"]["truth"])
    exam = next(reversed(result["exams"].values()))
    pairs = [
        pair
        for asked in exam
        for scores, truth in zip(asked["PRM"], asked["truth"], strict=True)
        if len(scores) == len(truth)
        for pair in zip(scores, truth, strict=True)
    ]
    natural = {"scores": [one for one, _ in pairs], "truth": [two for _, two in pairs]}
    found: dict[str, Any] = {"threshold": threshold}
    for name, part in (("planted", parts["measured"]), ("drawn", natural)):
        truth = part["truth"]
        found[name] = {
            "macro_f1": macro_f1([score > threshold for score in part["scores"]], truth),
            "all_right": macro_f1([True] * len(truth), truth),
            "steps": len(truth),
            "wrong": truth.count(False),
        }
    return found


def written(score: Mapping[str, float]) -> str:
    """A score as it stands in tables."""
    return f"{score['percent']:.1f} ({score['low']:.1f}-{score['high']:.1f})"


def tables(summary: Mapping[str, Any]) -> str:
    """Everything in Markdown."""
    numbers = summary["numbers"]
    parts = []
    for temperature, found in summary["temperatures"].items():
        scores = found["scores"]
        parts.append(
            f"Temperature {temperature}: base {written(scores['base'])}, thinking "
            f"{written(scores['thinking'])}, pass@1 {written(scores['pass@1'])}\n\n"
        )
        rows = [
            [arm, *[written(scores[f"{arm} @{number}"]) for number in numbers]]
            for arm in (*CHOICES, "oracle")
        ]
        rows += [
            [f"PRM - {other}, points", *[signed(lead[str(number)]) for number in numbers]]
            for other, lead in found["PRM above"].items()
        ]
        parts.append(markdown(["percent right", *[f"N = {n}" for n in numbers]], rows) + "\n")
        kinds = found["kinds"]
        arms = list(next(iter(kinds.values())))
        lines = [[kind, *[f"{kinds[kind][arm]:.1f}" for arm in arms]] for kind in kinds]
        parts.append(markdown(["percent right", *arms], lines) + "\n")
    return "".join(parts) + _seeds(summary)


def _seeds(summary: Mapping[str, Any]) -> str:
    """Steps, data and cost, a row a seed."""
    lines = []
    for number, steps in enumerate(summary["steps"]):
        data, cost = summary["data"][number], summary["cost_s"][number]
        cells = [
            f"{steps[name]['macro_f1']:.3f} ({steps[name]['all_right']:.3f})"
            for name in ("planted", "drawn")
        ]
        labels = ", ".join(f"{value:.3f}" for value in data["label_macro_f1"].values())
        solved = f"{data['right']} of {data['solutions']}"
        hours = f"{sum(cost.values()) / 3600:.2f}"
        lines.append([f"{number}", *cells, labels, solved, f"{data['wrong_steps']}", hours])
    limits = ", ".join(summary["data"][0]["label_macro_f1"])
    header = [
        "seed",
        "macro-F1 of planted steps (all right)",
        "of drawn steps",
        f"of labels, mc above {limits}",
        "right solutions",
        "steps labelled wrong",
        "core-hours",
    ]
    return markdown(header, lines)


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Percent right against N, with intervals, a panel a temperature."""
    panels = summary["temperatures"]
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    numbers = summary["numbers"]
    for axes, (temperature, found) in zip(every, panels.items(), strict=True):
        for arm in ("vote", "likelihood", "ORM", "PRM", "vote weighted by PRM", "oracle"):
            scores = [found["scores"][f"{arm} @{number}"] for number in numbers]
            middle = [each["percent"] for each in scores]
            ends = [
                [each["percent"] - each["low"] for each in scores],
                [each["high"] - each["percent"] for each in scores],
            ]
            axes.errorbar(numbers, middle, yerr=ends, marker="o", capsize=3, label=arm)
        for arm, style in (("base", ":"), ("thinking", "--"), ("pass@1", "-.")):
            height = found["scores"][arm]["percent"]
            axes.axhline(height, color="0.5", linestyle=style, label=arm)
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.set(xlabel="answers drawn, N", title=f"temperature {temperature}")
    every[0].set(ylabel="percent right, 95 % interval")
    every[0].legend(frameon=False, ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)
