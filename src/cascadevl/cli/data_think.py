"""``cascadevl data think OUT``: thinking data from tasks or a file, a model or a server."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascadevl.cli.arguments import Subparsers, positive_int
from cascadevl.cli.data_making import progress_bar
from cascadevl.cli.problems import add_problems, problems_of

if TYPE_CHECKING:
    from rich.console import Console

    from cascadevl.eval.responder import Responder
    from cascadevl.workflows.thinking_config import ThinkingConfig, ThinkingReport

KEPT_NOTHING = 1


def add_parser(actions: Subparsers) -> None:
    """Describe the action."""
    parser = actions.add_parser(
        "think",
        help="make thinking data: filtered worked solutions, and direct answers",
        description="Take worked solutions from tasks, a file, a model or a server; keep those "
        "with a right answer and clear, well-formed thinking; write them with the Thinking system "
        "prompt, and direct answers without it, as a meta file that trains.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted attempt")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    add_problems(parser).add_argument(
        "--all-questions",
        action="store_true",
        help="also a task's questions without worked reasoning",
    )
    _add_responder(parser)
    _add_filters(parser)
    parser.set_defaults(run=run)


def _add_responder(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("solutions (without --model or --url: those that come along)")
    group.add_argument("--model", metavar="NAME", help="a checkpoint, or the server's model name")
    group.add_argument("--url", help="an OpenAI-compatible server, as http://localhost:8000/v1")
    group.add_argument(
        "--api-key-env",
        metavar="NAME",
        default="OPENAI_API_KEY",
        help="environment variable with the server's key (OPENAI_API_KEY)",
    )
    group.add_argument("--samples", type=positive_int, default=4, help="of each question (4)")
    group.add_argument("--no-own", action="store_true", help="only sampled solutions")
    group.add_argument("--max-new-tokens", type=positive_int, default=4096, metavar="N")
    group.add_argument(
        "--temperature", type=float, default=0.6, metavar="T", help="0.6, as released for thinking"
    )
    group.add_argument("--top-p", type=float, default=0.95, metavar="P", help="(default: 0.95)")
    group.add_argument("--concurrency", type=positive_int, default=8, help="requests at a time (8)")
    group.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds (600)")


def _add_filters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is kept")
    group.add_argument("--keep", type=positive_int, default=1, help="of each question (1)")
    group.add_argument("--choice", choices=("shortest", "diverse"), default="shortest")
    group.add_argument("--boxed", action="store_true", help=r"ask for the answer within \boxed{}")
    group.add_argument(
        "--opening-optional",
        action="store_true",
        help="the server's prompt ends with <think>, so that solutions begin after it",
    )
    group.add_argument("--max-words", type=positive_int, default=8192, help="of thinking (8192)")
    group.add_argument(
        "--judge", metavar="NAME", help="model at --judge-url that scores each solution, 0 to 10"
    )
    group.add_argument("--judge-url", metavar="URL", help="(default: --url)")
    group.add_argument("--judge-threshold", type=float, default=7.0, help="lowest score (7)")
    group.add_argument(
        "--direct-ratio", type=float, default=1.0, metavar="X", help="direct answers per kept (1)"
    )
    group.add_argument("--system", metavar="TEXT", help="instead of the released Thinking prompt")
    group.add_argument("--template", default="internvl2_5", help="of the models to be trained")


def run(args: argparse.Namespace) -> int:
    """Make the data, and print what became of the solutions."""
    from rich.console import Console

    from cascadevl.workflows.thinking_data import make_thinking_data

    config = _config(args)
    problems = problems_of(args, worked_only=not args.all_questions)
    responder, judge = _responder(args), _judge(args)
    screen = Console(stderr=True)
    with progress_bar("groups", screen) as show:
        report = make_thinking_data(
            problems,
            config,
            responder=responder,
            judge=judge,
            facts=_facts(args),
            on_progress=show,
        )
    print_report(report, Console())
    return 0 if report.meta else KEPT_NOTHING


def _config(args: argparse.Namespace) -> ThinkingConfig:
    from cascadevl.scoring.reasoning import Rules
    from cascadevl.workflows.thinking_config import ThinkingConfig

    return ThinkingConfig(
        out=args.out,
        resume=args.resume,
        own=not args.no_own,
        num_samples=args.samples,
        keep=args.keep,
        choice=args.choice,
        boxed=args.boxed,
        direct_ratio=args.direct_ratio,
        system=args.system,
        template=args.template,
        rules=Rules(opening_optional=args.opening_optional, max_words=args.max_words),
        judge_threshold=args.judge_threshold,
        seed=args.seed,
    )


def _responder(args: argparse.Namespace) -> Responder | None:
    from cascadevl.errors import ConfigError

    if args.url is not None:
        if args.model is None:
            raise ConfigError("--url needs the model's name as the server knows it: --model NAME")
        return _server(args, args.url, args.model, args.temperature)
    if args.model is None:
        return None

    import cascadevl
    from cascadevl.eval.responder import ModelResponder

    model, processor = cascadevl.load(args.model)
    return ModelResponder(
        model=model,
        processor=processor,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
    )


def _judge(args: argparse.Namespace) -> Responder | None:
    from cascadevl.errors import ConfigError

    if args.judge is None:
        return None
    if args.judge_url is None and args.url is None:
        raise ConfigError("--judge needs a server: --judge-url or --url")
    return _server(args, args.judge_url or args.url, args.judge, 0.0)


def _server(args: argparse.Namespace, url: str, model: str, temperature: float) -> Responder:
    from cascadevl.eval.url_responder import UrlResponder

    return UrlResponder(
        url=url,
        model=model,
        api_key=os.environ.get(args.api_key_env),
        max_new_tokens=args.max_new_tokens,
        temperature=temperature,
        top_p=args.top_p,
        concurrency=args.concurrency,
        timeout_s=args.timeout,
    )


def _facts(args: argparse.Namespace) -> Mapping[str, Any]:
    """What solutions depend on; a server may move to another address."""
    names = ("model", "judge", "max_new_tokens", "temperature", "top_p")
    return {name: getattr(args, name) for name in names}


def print_report(report: ThinkingReport, console: Console) -> None:
    """Print what was written, and how many solutions each filter took out.

    Args:
        report: What became of the problems.
        console: Where to print.
    """
    from rich.table import Table

    table = Table("solutions", box=None, pad_edge=False)
    table.add_column("number", justify="right")
    table.add_column("share", justify="right")
    rows = {"all": report.num_solutions, "kept": report.num_thinking, **report.dropped}
    for name, count in rows.items():
        share = f"{100 * count / max(1, report.num_solutions):.1f} %"
        table.add_row(name.replace("_", " "), f"{count:,}", share)
    console.print(table)
    for kind, count in report.skipped.items():
        console.print(f"left out: {count} x {kind}", highlight=False)
    console.print(
        f"{report.num_problems:,} questions, {report.num_unsolved:,} without a good solution; "
        f"{report.num_thinking:,} thinking and {report.num_direct:,} direct records",
        highlight=False,
    )
    if report.meta is None:
        console.print("nothing was kept", style="bold red")
    else:
        console.print(f"train with: --data {report.meta}", highlight=False, soft_wrap=True)
