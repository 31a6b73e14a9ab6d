"""``cascadevl generate IN.jsonl OUT.jsonl``: answer a file of questions, in one attempt or more."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascadevl.cli.arguments import Subparsers, byte_size, increment, positive_int
from cascadevl.cli.wording import worded

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from cascadevl.data.processor import CascadeVLProcessor
    from cascadevl.engine.backends import Backend
    from cascadevl.engine.offline import OfflineConfig, OfflineReport
    from cascadevl.engine.sampling import SamplingParams

SOME_FAILED = 1
_SHOWN = 20  # failures that are printed


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
    _add_backend(parser)
    _add_sampling(parser)
    parser.set_defaults(run=run)


def _add_backend(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who answers")
    group.add_argument(
        "--backend",
        default="engine",
        metavar="B",
        help="engine (the default), transformers (slow, the reference), or the address of a vLLM "
        "server with the language half, as http://localhost:8000/v1",
    )
    group.add_argument("--served-model", metavar="NAME", help="as the server knows it, if several")
    group.add_argument(
        "--api-key-env",
        metavar="NAME",
        default="OPENAI_API_KEY",
        help="environment variable with the server's key (OPENAI_API_KEY)",
    )
    group.add_argument(
        "--concurrency", type=positive_int, default=16, metavar="N", help="requests at a time (16)"
    )
    group.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="of the server, in seconds (600)"
    )
    group.add_argument(
        "--cache-bytes",
        type=byte_size,
        default=2**30,
        metavar="N",
        help="memory of the engine for keys and values, as 500MB or 4GB (default: 1 GiB)",
    )
    group.add_argument(
        "--weights",
        choices=("stored", "packed", "int8"),
        default="stored",
        help="of the engine's language half: as stored (default), packed for a CPU, or int8",
    )
    group.add_argument(
        "--batch-invariant",
        action="store_true",
        help="compute every answer as if it ran alone, to the bit; slower",
    )
    group.add_argument("--device", default="cpu", help="cpu (the default), cuda, ...")


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
    group.add_argument(
        "--thinking", choices=("on", "off"), help="whether to reason first (default: the model's)"
    )
    group.add_argument(
        "--increment",
        type=increment,
        metavar="X",
        help="position step of a visual token, such as 1/16 (default: the model's)",
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
        backend, processor = _backend(args)
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

        report = answer_file(config, processor, backend, facts=_facts(args), on_progress=show)
    print_report(report, config, screen)
    return SOME_FAILED if report.failures else 0


def _config(args: argparse.Namespace) -> OfflineConfig:
    from cascadevl.engine.offline import OfflineConfig

    return OfflineConfig(
        questions=args.questions,
        out=args.out,
        root=args.root,
        sampling=_sampling(args),
        num_samples=args.num_samples,
        increments=args.increment,
        system=args.system,
        thinking={"on": True, "off": False, None: None}[args.thinking],
        token_ids=args.token_ids,
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


def _backend(args: argparse.Namespace) -> tuple[Backend, CascadeVLProcessor]:
    from cascadevl.cli.chat import usable_device
    from cascadevl.errors import ConfigError

    device = usable_device(args.device)
    if args.backend in ("engine", "transformers"):
        return _own_backend(args, device)
    if "://" not in args.backend:
        raise ConfigError(
            f"there is no backend {args.backend!r}; give engine, transformers, or the address of "
            f"a vLLM server as http://localhost:8000/v1"
        )
    from cascadevl.engine.http_json import HttpServer
    from cascadevl.engine.vllm import connect
    from cascadevl.model.vision_half import load_vision_half

    key = os.environ.get(args.api_key_env)
    server = HttpServer(url=args.backend, api_key=key, timeout_s=args.timeout)
    half, processor = load_vision_half(args.model, device=device)
    served, most = args.served_model, args.concurrency
    return connect(half, processor, server, served_model=served, concurrency=most), processor


def _own_backend(
    args: argparse.Namespace, device: torch.device
) -> tuple[Backend, CascadeVLProcessor]:
    import cascadevl

    model, processor = cascadevl.load(args.model, device=device)
    if args.backend == "transformers":
        from cascadevl.engine.transformers_backend import TransformersBackend

        return TransformersBackend(model=model, processor=processor), processor
    from cascadevl.engine.engine import Engine
    from cascadevl.engine.engine_backend import EngineBackend
    from cascadevl.engine.requests import EngineConfig

    config = EngineConfig(cache_bytes=args.cache_bytes, batch_invariant=args.batch_invariant)
    if args.weights == "stored":
        return EngineBackend(engine=Engine(model, processor, config)), processor
    from cascadevl.engine.packed_weights import pack

    packed = pack(model, args.weights, release=True)
    return EngineBackend(engine=Engine(packed, processor, config)), processor


def _facts(args: argparse.Namespace) -> dict[str, Any]:
    """What answers depend on beside the configuration; a server may move to another address."""
    kind = "vllm" if "://" in args.backend else args.backend
    return {"model": args.model, "backend": kind, "weights": args.weights}


def print_report(report: OfflineReport, config: OfflineConfig, console: Console) -> None:
    """Print what became of the questions; those that failed with their lines.

    Args:
        report: What became of them.
        config: Where they stood.
        console: Where to print.
    """
    for failure in report.failures[:_SHOWN]:
        place, problem = f"{config.questions}:{failure.line}", worded(failure.error)
        text = problem if problem.startswith(place) else f"{place}: {problem}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if len(report.failures) > _SHOWN:
        console.print(f"... and {len(report.failures) - _SHOWN} more", highlight=False)
    before = f" ({report.num_before:,} before)" if report.num_before else ""
    console.print(
        f"{report.num_before + report.num_answered:,} of {report.num_questions:,} questions are "
        f"answered{before}, {len(report.failures):,} failed; {report.num_tokens:,} new tokens",
        highlight=False,
    )
    console.print(f"answers: {config.out}", markup=False, highlight=False, soft_wrap=True)
