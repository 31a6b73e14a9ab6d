"""Two runs of flash_arms.py, question by question: which training keeps more at equal tokens.

Both must stand on the same baseline and ask the same questions (that is checked), as two runs with
another ``--mixed`` do. Everything is read from their folders, and nothing is computed with a model.

Run: ``python benchmarks/flash_compare.py runs/flash_arms runs/flash_mixed --names alike mixed``.
The last line is one JSON document; ``--figure FILE.png`` draws the curves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment import markdown
from flash_curves import (
    ALL_FULL,
    ALL_SMALL,
    BEFORE,
    KEPT,
    Draws,
    arms_of,
    between,
    budget,
    interval,
    leads,
    plot,
    share_kept,
)
from flash_rules import RULES
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DRAWN = (RULES[0], "random")
"""Rules whose curves are drawn."""


def read(folder: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What a run has found, seed by seed."""
    return [json.loads((folder / f"arms-{seed}.json").read_text("utf-8")) for seed in seeds]


def joined(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The arms of all runs beside each other, each under the name of its run, seed by seed.

    Args:
        runs: Results of every run.
    """
    found = []
    for results in zip(*runs.values(), strict=True):
        first = results[0]
        for other in results[1:]:
            assert other["rows"] == first["rows"], "the runs asked other questions"
            assert other["arms"][BEFORE] == first["arms"][BEFORE], "the runs have other baselines"
        arms = {
            f"{run}: {name}": arm
            for run, result in zip(runs, results, strict=True)
            for name, arm in result["arms"].items()
        }
        found.append({"rows": first["rows"], "arms": {BEFORE: first["arms"][BEFORE], **arms}})
    return found


def summarise(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Shares of the baseline's score, leads of the last run over the first, and budgets.

    Args:
        runs: Results of every run.
    """
    draws = Draws.of(joined(runs))
    first, *_, last = runs
    return {
        "arms": {
            name: {
                "tokens": float(draws.tokens[name][0]),
                "kept": interval(share_kept(draws, name)),
            }
            for name in draws.score
        },
        "ends": {
            name: interval(draws.score[f"{last}: {name}"] - draws.score[f"{first}: {name}"])
            for name in (ALL_FULL, ALL_SMALL)
        },
        "leads": {rule: leads(draws, f"{last}: {rule}", f"{first}: {rule}") for rule in RULES},
        "budgets": {
            f"{percent:g}": {run: budget(draws, f"{run}: {RULES[0]}", percent) for run in runs}
            for percent in KEPT
        },
    }


def tables(summary: Mapping[str, Any], runs: Sequence[str]) -> str:
    """Leads of the last run at equal tokens, and the budgets of both, as Markdown."""
    first, *_, last = runs
    shares = [name.rpartition(", ")[2] for name in next(iter(summary["leads"].values()))]
    lines = [
        [rule, *(f"{between(each)} at {100 * each['tokens']:.0f} %" for each in arms.values())]
        for rule, arms in summary["leads"].items()
    ]
    ends = ", ".join(f"{name}: {between(found)}" for name, found in summary["ends"].items())
    budgets = [
        [f"{percent} %", *(between(found[run], 100) for run in runs)]
        for percent, found in summary["budgets"].items()
    ]
    return (
        f"Points of {last} over {first} at equal visual tokens, by share of the tiles:\n\n"
        f"{markdown(['', *shares], lines)}\n"
        f"Without a choice: {ends}.\n\n"
        f"Percent of the visual tokens with which the {RULES[0]} keeps a share of the score:\n\n"
        f"{markdown(['kept', *runs], budgets)}"
    )


def draw(summary: Mapping[str, Any], runs: Sequence[str], path: Path) -> None:
    """What is kept of the baseline's score against visual tokens, a curve a rule and run."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    arms = summary["arms"]
    for number, run in enumerate(runs):
        for rule, style in zip(DRAWN, ("-", ":"), strict=True):
            names = [*arms_of(f"{run}: {rule}", arms), f"{run}: {ALL_SMALL}", f"{run}: {ALL_FULL}"]
            look = {"linestyle": style, "color": f"C{number}", "label": f"{run}, {rule}"}
            plot(axes, [arms[name] for name in names], **look)
    axes.axhline(99.5, color="grey", linewidth=0.8, linestyle="--")
    axes.axvline(50, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xlabel("visual tokens, percent of all (dashed: half of them)")
    axes.set_ylabel("percent of the baseline's score (dashed: 99.5)")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Read both runs and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs=2, help="what flash_arms.py was told by --out")
    parser.add_argument("--names", nargs=2, default=("first", "second"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    pairs = zip(args.names, args.folders, strict=True)
    summary = summarise({name: read(folder, args.seeds) for name, folder in pairs})
    if args.figure is not None:
        draw(summary, args.names, args.figure)
    print(tables(summary, args.names))
    print(json.dumps({"seeds": args.seeds, **summary}))


if __name__ == "__main__":
    main()
