"""``cascadevl generate IN.jsonl OUT.jsonl``: answer a file of questions, in one attempt or more."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cascadevl.cli.arguments import Subparsers, increment, positive_int
from cascadevl.cli.backends import add_backend, backend_facts, engine_of, open_backend
from cascadevl.cli.best_of import add_best_of, best_of_facts, critics_beside, wanted_best
from cascadevl.cli.thinking import add_thinking, opening_of
from cascadevl.cli.wording import print_failures, worded
from cascadevl.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from cascadevl.engine.offline import Failure, OfflineConfig, OfflineReport
    from cascadevl.engine.sampling import SamplingParams

SOME_FAILED = 1


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "generate",
        help="answer a file of questions",
        description="Answer every conversation of a JSONL file: the released format (an answer at "
        "the end is left out), or OpenAI's messages. Answers are appended as they come, one line a "
        "sample; after an interruption of any kind the same command goes on.",
    )
    parser.add_argument("questions", type=Path, metavar="IN.jsonl", help="a conversation a line")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl", help="file of answers")
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="a checkpoint folder, or a released name"
    )
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="of relative paths (default: that of IN.jsonl)"
    )
    add_backend(parser)
    _add_sampling(parser)
    add_best_of(parser)
    parser.set_defaults(run=run)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--num-samples", type=positive_int, default=1, metavar="N", help="of each question (1)"
    )
    group.add_argument(
        "--max-tokens", type=positive_int, default=1024, metavar="N", help="of an answer (1024)"
    )
    group.add_argument("--min-tokens", type=int, default=0, metavar="N", help="(default: 0)")
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy"
    )
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="(default: 1, off)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="(default: 0, off)")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="(default: 0, off)")
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="(default: 1, off)"
    )
    group.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends an answer; may be given several times",
    )
    group.add_argument("--json-schema", type=Path, metavar="FILE", help="that answers must follow")
    group.add_argument("--system", metavar="TEXT", help="system message, instead of the model's")
    add_thinking(group)
    group.add_argument(
        "--increment",
        type=increment,
        metavar="X",
        help="position step of a visual token, such as 1/16 (default: the model's)",
    )
    group.add_argument(
        "--visual-budget",
        metavar="B",
        help="tiles that a Flash model keeps full: full, compressed, a share (0.5 or 50%%), or "
        "threshold=P[,quantile=Q] (default: the model's thresholds)",
    )
    group.add_argument("--token-ids", action="store_true", help="write the tokens, too")
    group.add_argument(
        "--logprobs", type=int, metavar="N", help="write log-probabilities, and those of the N best"
    )


def run(args: argparse.Namespace) -> int:
    """Answer the questions, and say what became of them."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from cascadevl.engine.offline import answer_file

    config = _config(args)
    screen = Console(stderr=True)
    with screen.status(f"loading {args.model}"):
        backend, processor = open_backend(args)
        selection = None
        if config.best_of is not None:
            selection = critics_beside(args, engine_of(backend)).selection(config.best_of)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as progress:
        bar = progress.add_task("questions", total=None)

        def show(done: int, total: int, failed: int) -> None:
            words = f"questions ({failed} failed)" if failed else "questions"
            progress.update(bar, completed=done, total=total, description=words)

        report = answer_file(
            config,
            processor,
            backend,
            facts={**backend_facts(args), **best_of_facts(args)},
            selection=selection,
            on_progress=show,
        )
    print_report(report, config, screen)
    return SOME_FAILED if report.failures else 0


def _config(args: argparse.Namespace) -> OfflineConfig:
    from cascadevl.engine.offline import OfflineConfig
    from cascadevl.model.routing import parse_budget

    opening_of(args)  # refuses what contradicts itself
    best_of = wanted_best(args)
    if best_of is not None and args.num_samples > 1:
        raise ConfigError("--best-of writes the best answer; --num-samples asks for all of them")
    return OfflineConfig(
        questions=args.questions,
        out=args.out,
        root=args.root,
        sampling=_sampling(args),
        num_samples=args.num_samples,
        increments=args.increment,
        system=args.system,
        thinking={"on": True, "off": False, None: None}[args.thinking],
        force_thinking=args.force_thinking,
        thinking_budget=args.thinking_budget,
        best_of=best_of,
        token_ids=args.token_ids,
        visual_budget=None if args.visual_budget is None else parse_budget(args.visual_budget),
    )


def _sampling(args: argparse.Namespace) -> SamplingParams:
    from cascadevl.engine.sampling import SamplingParams

    schema = None if args.json_schema is None else args.json_schema.read_text(encoding="utf-8")
    return SamplingParams(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        max_tokens=args.max_tokens,
        min_tokens=args.min_tokens,
        stop=tuple(args.stop),
        logprobs=args.logprobs,
        json_schema=schema,
    )


def print_report(report: OfflineReport, config: OfflineConfig, console: Console) -> None:
    """Print what became of the questions; those that failed with their lines.

    Args:
        report: What became of them.
        config: Where they stood.
        console: Where to print.
    """
    print_failures([_placed(failure, config) for failure in report.failures], console)
    before = f" ({report.num_before:,} before)" if report.num_before else ""
    console.print(
        f"{report.num_before + report.num_answered:,} of {report.num_questions:,} questions are "
        f"answered{before}, {len(report.failures):,} failed; {report.num_tokens:,} new tokens",
        highlight=False,
    )
    console.print(f"answers: {config.out}", markup=False, highlight=False, soft_wrap=True)


def _placed(failure: Failure, config: OfflineConfig) -> str:
    place, problem = f"{config.questions}:{failure.line}", worded(failure.error)
    return problem if problem.startswith(place) else f"{place}: {problem}"
