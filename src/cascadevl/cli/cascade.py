"""``cascadevl cascade``: pre-training to the router, each stage on the model of the last."""

from __future__ import annotations

import argparse

from cascadevl.cli.arguments import Subparsers
from cascadevl.cli.configured import add_configuration, configuration


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "cascade",
        help="train a model through all stages, from pre-training to the router",
        description="Go through the stages of the InternVL3.5 report: pretrain, sft, rollouts, "
        "pairs, mpo, filter, gspo, vico, router, or those that the configuration names. A stage "
        "that is done is skipped, and one that was interrupted goes on, so the same command always "
        "finishes the work. Leaves summary.md and summary.json with score, time and operations of "
        "each stage. The last line of output is one JSON document.",
    )
    add_configuration(
        parser,
        "model=runs/sft/model, stages='[rollouts,pairs,mpo]', gspo.run.num_steps=80 or "
        "out=runs/cascade",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Go through the stages and print the summary."""
    import json

    from cascadevl.workflows.cascade import cascade
    from cascadevl.workflows.cascade_config import CascadeConfig

    config = configuration(args, CascadeConfig)
    if config is None:
        return 0
    summary = cascade(config)
    print(summary.table.read_text("utf-8"))
    scores = {line.stage: line.score for line in summary.lines if line.score is not None}
    print(json.dumps({"model": summary.model, "scores": scores, "table": str(summary.table)}))
    return 0
