"""``cascadevl mixture-search``: choose the shares of data sets by training on several of them."""

from __future__ import annotations

import argparse

from cascadevl.cli.arguments import Subparsers
from cascadevl.cli.configured import add_configuration, configuration


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "mixture-search",
        help="choose the mixture of data sets by training on several",
        description="Search the mixture for pre-training in the two stages of the InternVL3 "
        "report: shares within text and within multimodal data on separate runs, then the ratio of "
        "the two at a fixed budget. Every candidate is trained by the pretrain recipe and scored "
        "on held-out data; a finished one is not trained again. Leaves table.md, table.json and "
        "mixture.yaml, the configuration of a run on the chosen mixture. The last line of output "
        "is one JSON document.",
    )
    add_configuration(
        parser,
        "train.data.meta='[meta.json]', stage2_tokens=5000000 or out=runs/search",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search and print the table."""
    import json

    from cascadevl.workflows.mixture_config import MixtureSearchConfig
    from cascadevl.workflows.mixture_search import search

    config = configuration(args, MixtureSearchConfig)
    if config is None:
        return 0
    result = search(config)
    print(result.table.read_text("utf-8"))
    print(f"train on it: cascadevl train pretrain {result.config}\n")
    chosen = {"weights": result.weights, "ratio": result.ratio}
    paths = {"table": str(result.table), "config": str(result.config)}
    print(json.dumps({**chosen, **paths}))
    return 0
