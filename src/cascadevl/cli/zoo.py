"""``cascadevl zoo``: every released size, and what it is made of."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cascadevl.cli.arguments import Subparsers

if TYPE_CHECKING:
    from rich.console import Console

    from cascadevl.model.configuration import CascadeVLConfig
    from cascadevl.model.zoo import ReleasedModel


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "zoo",
        help="list every released size with its parts",
        description="List every released size with its vision encoder, language model and "
        "parameters; or, with a NAME, show one in detail.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="for example InternVL3.5-8B")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table, or one row of it in full."""
    from rich.console import Console

    if args.name is None:
        _print_all(Console())
    else:
        _print_one(args.name, Console())
    return 0


def _print_all(console: Console) -> None:
    from rich.table import Table

    from cascadevl.model.zoo import ZOO

    table = Table("name", "vision", "language model", box=None, pad_edge=False)
    table.add_column("size", justify="right")
    table.add_column("active", justify="right")
    for model in ZOO.values():
        active = f"{model.active_billion:g} B" if model.active_billion else ""
        table.add_row(model.name, model.vision, model.language, _billion(model), active)
    console.print(table)
    console.print(
        "\n`cascadevl zoo NAME` shows one in full, with its training runs", highlight=False
    )


def _print_one(name: str, console: Console) -> None:
    from rich.table import Table

    from cascadevl.model.zoo import config_for, released

    config, model = config_for(name), released(name)  # an unknown name ends here
    vision, text = config.vision_config, config.text_config
    active = f", {model.active_billion:g} B of them for a token" if model.active_billion else ""
    table = Table(title=model.name, title_justify="left", show_header=False, box=None)
    rows = {
        "parameters": f"{_billion(model)}{active}",
        "vision": f"{model.vision}: {vision.num_hidden_layers} x {vision.hidden_size}",
        "language model": f"{model.language}: {text.num_hidden_layers} x {text.hidden_size}, "
        f"vocabulary {text.vocab_size:,}",
        **({"tokens a tile": _tiles(config)} if model.flash else {}),
        "template": model.template,
        "context": f"{text.max_position_embeddings:,} tokens",
        "repository": model.hub_id,
    }
    if model.suffixes:
        rows["also with"] = " ".join(model.suffixes)
    if model.preset:
        rows["training runs"] = f"configs/*_{model.preset}.yaml in cascadevl's repository"
    for heading, value in rows.items():
        table.add_row(heading, value)
    console.print(table, highlight=False)


def _billion(model: ReleasedModel) -> str:
    """Parameters: what the report says, or else a count of what is stored."""
    from cascadevl.model.cost import parameter_counts
    from cascadevl.model.zoo import config_for

    number = model.report_billion
    if number is None:
        number = round(parameter_counts(config_for(model.name)).total / 1e9, 1)
    return f"{number:g} B"


def _tiles(config: CascadeVLConfig) -> str:
    return f"{config.tokens_per_tile} or {config.compressed_tokens}, as the router decides"
