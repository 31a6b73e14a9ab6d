"""Do steps choose better than votes? Best of N where finding is hard and checking is not.

The InternVL3 report's table 2 and VisualPRM's comparison (arXiv 2503.10291), small. For each seed:

1. ``sft``: micro is fine-tuned to find numbers by their sum (`cascadevl.tasks.subset_sum`; a third
   of the lists are handwritten), at once or with worked steps inside ``<think>``, as the system
   prompt says.
2. ``solutions``: sixteen answers to each of other training questions are drawn, and the steps of
   up to four of them, right and wrong ones in turn, judged by sixteen continuations
   (`data process --balanced`).
3. ``PRM``, ``ORM``: two judges are trained from the policy (`train prm`) on the same solutions for
   the same number of steps: one on the labels of steps, one on whole solutions and their outcome.
4. ``exam``: 32 answers are drawn to each of 200 held-out questions, at both temperatures. All arms
   choose among the same answers, at N = 2, 4, 8, 16, 32: the ``vote``; ``likelihood``, the answer
   whose tokens the policy itself finds most probable; ``ORM``; ``PRM`` by the mean over steps,
   which is the claim, and by its lowest and its last step; votes weighted by PRM; and ``oracle``,
   whether any is right. Beside them stand ``base`` and ``thinking``, greedy, and ``pass@1``.
5. ``planted``: worked solutions with one wrong number in a known step, from which on all is wrong;
   macro-F1 of the steps, the threshold chosen on other solutions.

Why so. A judge cannot mend what it sees no better than its policy; so the questions must be easier
to check than to answer. Whoever writes the first of the numbers must know the others already, and
whoever reads the sum only compares it. Running totals (`cascadevl.tasks.chains`) were tried first:
micro learns to write them, but its judges did not learn to check them, and chose worse than chance
(docs/experiments.md). At temperature 0.7, VisualPRM's in its examination, fewer answers differ; at
1, VisualPRM's when it draws solutions, right ones are rarer. Both are reported. The outcome judge
is trained on whole solutions: a process judge asked about a whole solution would be asked what it
never saw. How well labels agree with the truth is reported at every threshold.

PRM counts as better where intervals stand apart; since all choose among the same answers, the
paired difference is reported beside it. What is done is not done again: stages, and questions
within them, go on after a kill. Policy and judges were
tried on a seed that is not reported, but for the number of training steps, chosen by planted errors
on labels of seed 0.

Cost: about 0.8 core-hours a seed; the program prints what it took. ``--tiny`` proves in a minute
that it works.
Run: ``python benchmarks/best_of_n_arms.py --threads 1 --out runs/best_of_n``. The last line is one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import best_of_n_judging as judging
import best_of_n_material as material
import torch
from best_of_n_material import TINY, Size
from best_of_n_report import draw, summarise, tables
from experiment import kept

from cascadevl.host_memory import keep_freed_memory


@contextmanager
def timed(out: Path, stage: str) -> Iterator[None]:
    """Note what a stage takes of the processor; that of a killed attempt is not known."""
    begin = time.process_time()
    try:
        yield
    finally:
        out.mkdir(parents=True, exist_ok=True)
        row = {"stage": stage, "cpu_s": time.process_time() - begin}
        with (out / "cost.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def costs(out: Path) -> dict[str, float]:
    """Seconds of one core by stage."""
    found: dict[str, float] = {}
    for line in (out / "cost.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        found[row["stage"]] = found.get(row["stage"], 0.0) + row["cpu_s"]
    return found


def one_seed(model: str, size: Size, out: Path, seed: int) -> dict[str, Any]:
    """Everything of one seed."""
    with timed(out, "sft"):
        policy = material.fine_tuned(model, size, out, seed)
    with timed(out, "solutions"):
        report, outcomes = material.solutions(policy, size, out, seed)
        data = material.facts(report, out / "steps", material.judged_questions(size, seed))
    assert report.meta is not None, "there are steps"
    with timed(out, "PRM"):
        process = material.judge(policy, report.meta, size, out / "prm", seed)
    with timed(out, "ORM"):
        outcome = material.judge(policy, outcomes, size, out / "orm", seed)
    with timed(out, "planted"):
        planted = kept(out / "planted.json", lambda: judging.planted(process, size, seed))
    with timed(out, "exam"):
        greedy = kept(out / "greedy.json", lambda: judging.greedy(policy, size, seed))
        exams = {
            f"{temperature:g}": examined(policy, process, outcome, size, out, seed, temperature)
            for temperature in size.temperatures
        }
    return {
        "greedy": greedy,
        "exams": exams,
        "planted": planted,
        "data": data,
        "cost_s": costs(out),
    }


def examined(
    policy: Path,
    process: Path,
    outcome: Path,
    size: Size,
    out: Path,
    seed: int,
    temperature: float,
) -> list[dict[str, Any]]:
    """The answers to each question at one temperature, with what every judge thinks of them."""
    name = f"exam-{temperature:g}"
    store = out / name
    judging.drawn(policy, size, store, seed, temperature)

    def scored(judge: Path, *, by_steps: bool) -> dict[str, Any]:
        critics = judging.judges(judge)
        scorer = critics.process if by_steps else critics.outcome
        assert scorer is not None, "a judge in both of its uses"
        return {"scores": judging.scored(store, scorer)}

    prm = kept(out / f"{name}-prm.json", lambda: scored(process, by_steps=True))
    orm = kept(out / f"{name}-orm.json", lambda: scored(outcome, by_steps=False))
    return [
        {**said, "PRM": steps, "ORM": whole}
        for said, steps, whole in zip(
            judging.said(store, size, seed), prm["scores"], orm["scores"], strict=True
        )
    ]


def main() -> None:
    """Run what is missing, and write tables and picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="micro", help="what is fine-tuned (micro)")
    parser.add_argument("--out", type=Path, default=Path("runs/best_of_n"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="little of all, to see that it works")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    size = TINY if args.tiny else Size()
    results = [
        kept(
            args.out / f"seed-{seed}.json",
            lambda seed=seed: one_seed(args.model, size, args.out / f"{seed}", seed),
        )
        for seed in args.seeds
    ]
    summary = summarise(results)
    (args.out / "best_of_n.md").write_text(tables(summary), "utf-8")
    draw(summary, args.out / "best_of_n.png")
    print(tables(summary))
    core_hours = sum(sum(cost.values()) for cost in summary["cost_s"]) / 3600
    print(f"{core_hours:.2f} core-hours")
    print(json.dumps({"model": args.model, "tiny": args.tiny, **summary}))


if __name__ == "__main__":
    main()
