"""Does the cascade beat either kind of reinforcement alone? The InternVL3.5 report's Table 16.

From one fine-tuned model: MPO alone, GSPO alone, GSPO for twice as long, and MPO followed by GSPO
(the cascade). All learn from the same questions; the answers that the fine-tuned model gave to them
are sampled once a seed, make MPO's pairs and choose GSPO's questions, and count for every arm that
uses them. A cascade whose stages name ``sft`` fine-tunes once a seed, which counts for no arm.
Held-out questions are asked after every stage; all arms answer the same ones, so the cascade's
lead over each is also given as a paired difference. Operations are counted by formula
(`cascadevl.workflows.cascade_stages.Done`), time as it passed.

Scores do not depend on the machine. What is done is not done again.
Run: ``python benchmarks/cascade_arms.py configs/cascade_micro.yaml --out runs/arms``. The last line
is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiment import kept, markdown, pooled, quiet, signed, written
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cascadevl.config import load_config
from cascadevl.host_memory import keep_freed_memory
from cascadevl.scoring.metrics import bootstrap_interval
from cascadevl.workflows.cascade import COURSE, cascade, right_answers
from cascadevl.workflows.cascade_config import CascadeConfig, StageName

ARMS: dict[str, tuple[StageName, ...]] = {
    "MPO": ("rollouts", "pairs", "mpo"),
    "GSPO": ("rollouts", "filter", "gspo"),
    "GSPO, twice as long": ("rollouts", "filter", "gspo"),
    "cascade": ("rollouts", "pairs", "mpo", "filter", "gspo"),
}
TWICE = "GSPO, twice as long"
START = "start"

DRAWN = ", drawn at "
"""In the names of rows whose answers are sampled; before it stands the row of greedy ones."""


def main() -> None:
    """Run what is missing, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="configuration of the cascade")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, default=Path("runs/arms"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    base = load_config(CascadeConfig, files=[args.config], overrides=args.overrides)
    results = []
    for seed in args.seeds:
        shared = (*tuned(base), "rollouts")
        sampled = seeded(base, seed, shared, args.out / f"{seed}" / "sampled")
        begun = kept(args.out / f"sampled-{seed}.json", lambda sampled=sampled: run(sampled))
        results.append({"arm": START, "seed": seed, **begun, "lines": compared(begun["lines"])[:1]})
        for arm in ARMS:
            config = arm_config(base, arm, seed, args.out)
            share(sampled.out, config.out)
            name = f"{list(ARMS).index(arm)}-{seed}.json"
            result = kept(args.out / name, lambda config=config: run(config))
            results.append({"arm": arm, "seed": seed, **result})
    summary = summarise(results)
    (args.out / "arms.md").write_text(f"{table(summary)}\n{lead_table(summary)}", "utf-8")
    draw(summary, args.out / "arms.png")
    print((args.out / "arms.md").read_text("utf-8"))
    print(json.dumps(summary))


def tuned(base: CascadeConfig) -> tuple[StageName, ...]:
    """Stages in front of what is compared."""
    return tuple(stage for stage in base.stages if stage == "sft")


def seeded(
    base: CascadeConfig, seed: int, stages: tuple[StageName, ...], out: Path
) -> CascadeConfig:
    """The cascade with some of its stages, everything drawn by this seed."""
    sft, mpo, gspo = base.sft, base.mpo, base.gspo
    return replace(
        base,
        stages=stages,
        out=out,
        sft=replace(sft, run=replace(sft.run, seed=seed)),
        rollouts=replace(base.rollouts, seed=seed),
        pairs=replace(base.pairs, seed=seed),
        mpo=replace(mpo, run=replace(mpo.run, seed=seed)),
        gspo=replace(gspo, run=replace(gspo.run, seed=seed)),
        exam=replace(base.exam, seed=base.exam.seed + seed),
    )


def arm_config(base: CascadeConfig, arm: str, seed: int, out: Path) -> CascadeConfig:
    """The cascade of one arm."""
    stages = (*tuned(base), *ARMS[arm])
    config = seeded(base, seed, stages, out / f"{seed}" / f"{list(ARMS).index(arm)}")
    if arm != TWICE:
        return config
    run = config.gspo.run
    longer = replace(config.gspo, run=replace(run, num_steps=2 * run.num_steps))
    return replace(config, gspo=longer)


def share(sampled: Path, out: Path) -> None:
    """Give an arm what was sampled once, with the time it took."""
    if not (out / COURSE).exists():
        shutil.copytree(sampled, out, dirs_exist_ok=True)


def run(config: CascadeConfig) -> dict[str, Any]:
    """Go through a cascade; keep its summary, and which questions its last model gets right."""
    lines = [asdict(line) for line in cascade(config, console=quiet()).lines]
    return {"lines": lines, "right": right_answers(config)}


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the start and of every arm: scores over all seeds, time and operations of a seed.

    ``greedy`` and ``drawn`` pool all kinds of questions, by how they were answered; ``leads`` are
    the cascade's over each, question by question.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        found.setdefault(result["arm"], []).append(result)
    summary = {}
    for arm, runs in found.items():
        lines = [compared(run["lines"]) for run in runs]
        rows = {name: [run["right"][name] for run in runs] for name in runs[0]["right"]}
        summary[arm] = {
            **_by_answering(rows),
            "rows": {name: pooled(right) for name, right in rows.items()},
            "constant": _constant(lines[0]),
            "seconds": [sum(line["seconds"] for line in each) for each in lines],
            "flops": [sum(line["flops"] for line in each) for each in lines],
            "leads": {name: lead(found["cascade"], runs, name) for name in rows},
        }
    return summary


def compared(lines: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Of an arm's stages, the model that all arms begin with and what is done to it."""
    stages = [line["stage"] for line in lines]
    if "sft" not in stages:
        return lines
    begin, *rest = lines[stages.index("sft") :]
    return [{**begin, "seconds": 0.0, "flops": 0.0}, *rest]


def _constant(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Percent right of the most frequent answer to each row."""
    return {row["name"]: 100 * row["constant"] for line in lines for row in line["exam"]}


def _by_answering(rows: Mapping[str, Sequence[list[bool]]]) -> dict[str, dict[str, Any]]:
    """All rows of greedy answers together, and all of drawn ones."""
    found: dict[str, list[list[bool]]] = {}
    for name, right in rows.items():
        seeds = found.setdefault("drawn" if DRAWN in name else "greedy", [[] for _ in right])
        for own, more in zip(seeds, right, strict=True):
            own += more
    return {kind: pooled(seeds) for kind, seeds in found.items()}


def lead(
    leader: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], name: str
) -> dict[str, float]:
    """Points by which one arm is ahead of another on the same questions, with a 95 % interval."""
    points = [
        100.0 * (mine - theirs)
        for one, other in zip(leader, others, strict=True)
        for mine, theirs in zip(one["right"][name], other["right"][name], strict=True)
    ]
    low, high = bootstrap_interval(points, np.random.default_rng(0))
    return {"percent": sum(points) / len(points), "low": low, "high": high}


def table(summary: Mapping[str, Any]) -> str:
    """The arms as a Markdown table."""
    names = list(summary[START]["rows"])
    kinds = [kind for kind in ("greedy", "drawn") if kind in summary[START]]
    header = ["", *(part for kind in kinds for part in (f"all, {kind}", "each seed"))]
    header += [*names, "minutes", "TFLOP"]
    rows = []
    for arm, found in summary.items():
        pools: list[str] = []
        for kind in kinds:
            seeds = ", ".join(f"{value:.1f}" for value in found[kind]["seeds"])
            pools += [written(found[kind]), seeds]
        minutes = sum(found["seconds"]) / len(found["seconds"]) / 60
        flops = tflop(found)
        scores = [written(found["rows"][name]) for name in names]
        rows.append([arm, *pools, *scores, f"{minutes:.1f}", f"{flops:.3f}"])
    constants = [f"{summary[START]['constant'][name]:.1f}" for name in names]
    rows.append(["most frequent answer", *[""] * 2 * len(kinds), *constants, "", ""])
    return markdown(header, rows)


def tflop(found: Mapping[str, Any]) -> float:
    """Operations of an arm, the mean of its seeds."""
    return float(sum(found["flops"]) / len(found["flops"]) / 1e12)


def lead_table(summary: Mapping[str, Any]) -> str:
    """The cascade's leads as a Markdown table."""
    names = list(summary[START]["rows"])
    rows = [
        [arm, *[signed(found["leads"][name]) for name in names]]
        for arm, found in summary.items()
        if arm != "cascade"
    ]
    return markdown(["points of the cascade above", *names], rows)


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Score against operations: a panel a kind of questions, an arm a point with its interval."""
    names = list(summary[START]["rows"])
    kinds = [name for name in names if DRAWN not in name]
    figure = Figure(figsize=(1 + 3.2 * len(kinds), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        for arm, found in summary.items():
            (line,) = axes.plot([], [], "o", label=arm)
            for name in names:
                if name.partition(DRAWN)[0] != kind:
                    continue
                score = found["rows"][name]
                axes.errorbar(
                    [tflop(found)],
                    [score["percent"]],
                    yerr=[[score["percent"] - score["low"]], [score["high"] - score["percent"]]],
                    fmt="o",
                    capsize=4,
                    color=line.get_color(),
                    markerfacecolor=line.get_color() if name == kind else "white",
                )
        axes.set_title(kind)
        axes.margins(0.1)
    figure.supxlabel("operations after fine-tuning, TFLOP", fontsize="medium")
    figure.supylabel("percent right of greedy (full) and drawn (hollow) answers", fontsize="medium")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
