"""Micro on its held-out suite: three sets of questions, intervals, baselines, and the ceiling.

Beside handwritten numbers stands what a support vector machine reads that is given the very same
scans one by one. About a quarter of an hour on a quiet core. Prints a table in Markdown; the last
line is one JSON document.
Run: ``python benchmarks/examine_micro.py [--model runs/micro/anneal/model]``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cascadevl.model.loading import find
from cascadevl.model.shipped import edition
from cascadevl.workflows.micro_examination import NUM_QUESTIONS, SEEDS, examine, table


def main() -> None:
    """Examine, and write the scores to a file where one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="micro", help="a checkpoint (default: the shipped one)")
    parser.add_argument("--questions", type=int, default=NUM_QUESTIONS, help="of each row and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, help="where the JSON document is written as well")
    args = parser.parse_args()
    scores = examine(
        args.model,
        num_questions=args.questions,
        seeds=args.seeds,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    number = edition(find(args.model))
    print(f"{args.model}{'' if number is None else f', edition {number}'}\n")
    print(table(scores))
    if args.out is not None:
        args.out.write_text(scores.json() + "\n", "utf-8")
    print(scores.json())


if __name__ == "__main__":
    main()
