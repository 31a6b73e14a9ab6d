"""``cascadevl data``: make training data, and see what a data set holds and what is broken."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cascadevl.cli import data_filter, data_preferences, data_process, data_rollouts, data_think
from cascadevl.cli.arguments import Subparsers, positive_int

if TYPE_CHECKING:
    from rich.console import Console

    from cascadevl.data.check import CheckReport, DatasetReport, Histogram
    from cascadevl.data.tiling import TilingConfig
    from cascadevl.types import Record

BAR_CELLS = 40
MAX_BINS = 12
FOUND_BAD = 1


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command and its sub-commands."""
    parser = subparsers.add_parser(
        "data",
        help="look at training data, make thinking and preference data",
        description="Look at training data in the released formats, and make some.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = actions.add_parser(
        "check",
        help="count records, find broken ones, show sizes",
        description="Read every record of a meta file, report the broken ones with file and "
        "line, and show how many tiles (and, with --model, tokens) the others have. No model "
        "is needed. Exit code 1 if a record is broken.",
    )
    check.add_argument("meta", type=Path, metavar="META", help="the meta file (JSON)")
    check.add_argument(
        "--model",
        metavar="DIR",
        help="a model folder: counts tokens as this model's training would see them",
    )
    check.add_argument("--template", help="conversation template, if not the model's own")
    check.add_argument("--max-tokens", type=positive_int, help="longer records count as broken")
    check.add_argument(
        "--max-tiles", type=positive_int, help="tiles of a picture (12, the model's)"
    )
    check.add_argument("--tile-px", type=positive_int, help="side of a tile (448, the model's)")
    check.add_argument(
        "--deep", action="store_true", help="decode every picture and video, not only headers"
    )
    check.set_defaults(run=run)
    for action in (data_think, data_rollouts, data_preferences, data_filter, data_process):
        action.add_parser(actions)


def run(args: argparse.Namespace) -> int:
    """Check and print."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from cascadevl.data.check import check
    from cascadevl.tasks.naming import open_entry

    tiling, measure = _measure(args)
    screen = Console(stderr=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done)

        report = check(
            args.meta,
            tiling=tiling,
            measure=measure,
            max_tokens=args.max_tokens,
            deep=args.deep,
            progress=advance,
            open_entry=open_entry,
        )
    console = Console()
    print_report(report, console)
    _print_limits(args, console)
    return FOUND_BAD if report.num_bad else 0


def print_report(report: CheckReport, console: Console) -> None:
    """Print a table of all data sets, then each one's problems and histograms.

    Args:
        report: What was found.
        console: Where to print.
    """
    from rich.table import Table

    table = Table(title=str(report.meta), title_justify="left")
    table.add_column("data set")
    for heading in ("records", "good", "bad", "per epoch", "images", "videos"):
        table.add_column(heading, justify="right")
    for entry in report.datasets:
        bad = entry.num_records - entry.num_good
        counts = (entry.num_records, entry.num_good, bad, entry.num_draws)
        media = (entry.num_images, entry.num_videos)
        table.add_row(entry.name, *(f"{count:,}" for count in counts + media))
    console.print(table)
    for entry in report.datasets:
        _print_dataset(entry, console)
    num_records = sum(entry.num_records for entry in report.datasets)
    if report.num_bad:
        text = f"{report.num_bad:,} of {num_records:,} records are broken"
        console.print(f"\n{text}", style="bold red", highlight=False)
    else:
        console.print(f"\nall {num_records:,} records can be used", style="bold green")


def _print_limits(args: argparse.Namespace, console: Console) -> None:
    """Say what was not looked at, so that a clean report is not taken for more than it is."""
    left = []
    if not args.deep:
        left.append("pixels and video frames (--deep decodes them)")
    if args.model is None:
        left.append("tokens and control tokens in texts (--model DIR counts and checks them)")
    if left:
        console.print(f"not looked at: {'; '.join(left)}", style="dim", highlight=False)


def _print_dataset(entry: DatasetReport, console: Console) -> None:
    for problem in entry.problems:
        console.print(f"\n{entry.name}: {problem.count} x {problem.kind}", style="bold red")
        for message in problem.messages:
            console.print(f"  {message}", markup=False, highlight=False, soft_wrap=True)
        if problem.count > len(problem.messages):
            console.print(f"  and {problem.count - len(problem.messages)} more")
    if entry.tiles.total:
        _print_histogram(f"{entry.name}: tiles of a record", entry.tiles, console)
    if entry.tokens is not None and entry.tokens.total:
        _print_histogram(f"{entry.name}: tokens of a record", entry.tokens, console)


def _print_histogram(title: str, histogram: Histogram, console: Console) -> None:
    low, middle, high = (histogram.quantile(share) for share in (0.0, 0.5, 1.0))
    facts = f"least {low}, median {middle}, mean {histogram.mean:.1f}, most {high}"
    console.print(f"\n{title} ({facts})", style="bold")
    edges = bin_edges(low, high)
    counts = histogram.bins(edges)
    labels = [
        f"{first}" if last - first == 1 else f"{first} to {last - 1}"
        for first, last in zip(edges, (*edges[1:], high + 1), strict=True)
    ]
    for label, count in zip(labels, counts, strict=True):
        bar = "█" * round(BAR_CELLS * count / max(counts))
        console.print(f"  {label:>{max(map(len, labels))}} {bar} {count:,}", highlight=False)


def bin_edges(low: int, high: int) -> tuple[int, ...]:
    """Lower edges of at most a dozen equally wide bins from ``low`` to ``high``.

    Args:
        low: Least value.
        high: Largest value.
    """
    width = -(-(high - low + 1) // MAX_BINS)
    return tuple(range(low, high + 1, width))


def _measure(
    args: argparse.Namespace,
) -> tuple[TilingConfig, Callable[[Record], tuple[int, int]] | None]:
    """The tiling, and how to count tokens where a model says how it writes conversations."""
    from cascadevl.data.tiling import TilingConfig
    from cascadevl.errors import ConfigError

    chosen = {"max_tiles": args.max_tiles, "tile_px": args.tile_px}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if args.model is None:
        if args.template or args.max_tokens:
            raise ConfigError("--template and --max-tokens need --model, for its tokenizer")
        return TilingConfig(**chosen), None

    from cascadevl.data.example import ExampleBuilder, ExampleConfig
    from cascadevl.model.loading import find
    from cascadevl.model.repository_files import load_processor

    processor = load_processor(find(args.model))
    tiling = replace(processor.tiling, **chosen)
    config = ExampleConfig(
        template=args.template or processor.template.name,
        system=processor.system_message,
        tiling=tiling,
        max_tokens=args.max_tokens or sys.maxsize,
    )
    builder = ExampleBuilder(processor.tokenizer, config, processor.tokens_per_tile)

    def measure(record: Record) -> tuple[int, int]:
        example = builder(record)
        num_slots = len(example.tiles_per_image)
        num_visual = example.num_tiles * processor.tokens_per_tile
        return len(example.input_ids) - num_slots + num_visual, example.num_tiles

    return tiling, measure
