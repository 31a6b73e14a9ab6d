"""``cascadevl serve MODEL``: an OpenAI-compatible server, in one process or in several."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from cascadevl.cli.arguments import Subparsers, positive_int
from cascadevl.cli.backends import add_computing
from cascadevl.cli.best_of import add_reward_model, critics_beside
from cascadevl.cli.chat import usable_device
from cascadevl.cli.serve_limits import (
    add_limits,
    add_safety,
    api_config,
    check_safety,
    fetcher_of,
    limits_of,
    listen_config,
)
from cascadevl.cli.serve_members import add_vllm, engine_settings, run_member
from cascadevl.cli.serve_ray import add_ray, check_ray, ray_halves
from cascadevl.cli.verifying import add_sources, open_guard
from cascadevl.errors import ConfigError

if TYPE_CHECKING:
    from cascadevl.data.processor import CascadeVLProcessor
    from cascadevl.engine.critics import Critics
    from cascadevl.model.configuration import CascadeVLConfig
    from cascadevl.serving.engine_thread import Answers
    from cascadevl.serving.openai_prompts import Asker

_NEEDED = ("fastapi", "uvicorn", "zmq", "msgspec", "prometheus_client")


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "serve",
        help="an OpenAI-compatible server",
        description="Answer OpenAI's clients: chat with pictures, tools and JSON schemas, "
        "continuations, metrics. Stops at SIGTERM once all it has in hand is answered. The vision "
        "half and the language half run in one process, or in several on one or more machines.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint folder, a released name, or micro"
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="(127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="(8000; 0 for any)")
    parser.add_argument("--name", metavar="NAME", help="as clients ask for it (default: MODEL)")
    add_limits(parser)
    add_safety(parser)
    _add_model(parser)
    add_reward_model(parser.add_argument_group("the best of several answers (best_of)"))
    add_sources(parser.add_argument_group("checking answers (verify)"))
    _add_processes(parser)
    add_vllm(parser)
    add_ray(parser)
    parser.set_defaults(run=run)


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("computing")
    add_computing(group)
    group.add_argument(
        "--threads",
        type=positive_int,
        metavar="N",
        help="of each half on a CPU (default: the cores shared out among the halves of this "
        "machine; more threads than cores make each other wait)",
    )


def _add_processes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("processes")
    group.add_argument(
        "--coupled",
        action="store_true",
        help="both halves in one process (the default where nothing else is said)",
    )
    group.add_argument(
        "--vision", type=int, metavar="N", help="vision servers of this machine, as processes"
    )
    group.add_argument(
        "--language", type=int, metavar="N", help="language servers of this machine, as processes"
    )
    group.add_argument(
        "--wire",
        metavar="ADDRESS",
        help="where servers join, as tcp://10.0.0.1:5555, for those of other machines; whoever "
        "reaches it can ask and answer, so keep it private",
    )
    group.add_argument(
        "--role", choices=("vision", "language"), help="be one of the servers instead"
    )
    group.add_argument("--join", metavar="ADDRESS", help="the --wire of the front, with --role")
    group.add_argument(
        "--features",
        metavar="ADDRESS",
        help="where a language server takes features, as tcp://10.0.0.2:5556",
    )
    group.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # ends with this process


def run(args: argparse.Namespace) -> int:
    """Serve the model, or one half of it."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not installed; serving needs the extra 'serve': "
            f"pip install 'cascadevl[serve]'"
        )
    if args.vllm is not None and args.role is None:  # both servers beside the front
        args.language = args.language or 1
        args.vision = args.vision or (1 if args.wire is None else None)
    _check_processes(args)
    check_safety(args)
    check_ray(args)
    if args.role is not None:
        return run_member(args)
    if args.vision is None and args.language is None and args.wire is None:
        return _run_coupled(args)
    return _run_front(args)


def _check_processes(args: argparse.Namespace) -> None:
    """Refuse words that exclude each other.

    Raises:
        ConfigError: If there are some.
    """
    is_front = args.vision is not None or args.language is not None or args.wire is not None
    if args.role is not None and (is_front or args.coupled):
        raise ConfigError("--role is one server; leave out --coupled, --vision, --language, --wire")
    if args.vllm is not None and (args.coupled or args.role == "vision"):
        raise ConfigError("--vllm computes the language half; leave out --coupled, --role vision")
    if args.coupled and is_front:
        raise ConfigError("--coupled is one process; leave out --vision, --language and --wire")
    if args.role is not None and args.visual_budget is not None:
        raise ConfigError(
            "--visual-budget is for the front, which tells its servers; give it there"
        )
    if (args.role is not None) != (args.join is not None):
        raise ConfigError("--role and --join belong together: who, and for which front")
    if (args.role == "language") != (args.features is not None):
        raise ConfigError("--features is where a language server takes features: give it with one")
    if is_front and args.wire is None and not (args.vision and args.language):
        raise ConfigError(
            "name at least one --vision and one --language server, or a --wire where those of "
            "other machines join"
        )


def _asker(
    args: argparse.Namespace,
    processor: CascadeVLProcessor,
    config: CascadeVLConfig,
    critics: Critics,
) -> Asker:
    """What makes requests of bodies.

    Raises:
        RequestError: If the model cannot keep the visual budget.
    """
    from cascadevl.model.routing import budget_for, parse_budget
    from cascadevl.serving.openai_prompts import Asker

    budget = None if args.visual_budget is None else parse_budget(args.visual_budget)
    budget_for(config, budget)
    return Asker(
        processor=processor,
        config=config,
        max_tokens=args.max_tokens,
        visual_budget=budget,
        limits=limits_of(args),
        critics=critics,
    )


def _serve(args: argparse.Namespace, answers: Answers, asker: Asker) -> None:
    """Listen until the process is told to stop."""
    from cascadevl.serving.api import Api
    from cascadevl.serving.logs import logging_to
    from cascadevl.serving.run_server import ApiServer, serve

    config = api_config(args)
    guard = open_guard(args, asker.processor)
    server = ApiServer(Api(answers, asker, config, fetcher_of(args), guard), listen_config(args))
    with logging_to(args.log):
        serve(server, lambda address: print(f"{config.model_name} at {address}/v1", flush=True))


def _share_of_cores(num_halves: int) -> int:
    """Threads of each of several halves that compute on this machine at the same time."""
    import torch

    return max(1, torch.get_num_threads() // num_halves)


def _run_coupled(args: argparse.Namespace) -> int:
    import torch

    import cascadevl
    from cascadevl.serving.coupled import Coupled
    from cascadevl.serving.members import make_engine

    model, processor = cascadevl.load(args.model, device=usable_device(args.device))
    torch.set_num_threads(args.threads or _share_of_cores(2))
    engine = make_engine(model, processor, engine_settings(args))
    asker = _asker(
        args, processor, model.config, critics_beside(args, engine, shares_features=False)
    )
    _serve(args, Coupled(engine), asker)
    return 0


def _run_front(args: argparse.Namespace) -> int:
    from cascadevl.model.part import load_settings
    from cascadevl.serving.member import fingerprint
    from cascadevl.serving.pipeline import Pipeline
    from cascadevl.serving.processes import Keeper

    config, processor, checkpoint = load_settings(args.model)
    asker = _asker(args, processor, config, critics_beside(args, None))
    with TemporaryDirectory(prefix="cascadevl-") as folder:
        local = f"ipc://{folder}/front"
        addresses = [local] if args.wire is None else [local, args.wire]
        pipeline = Pipeline(config, addresses, weights=fingerprint(checkpoint.path))
        is_ray = args.ray is not None
        keepers = [] if is_ray else [Keeper(words) for words in _members(args, local, folder)]
        try:
            for keeper in keepers:
                keeper.start()
            with ray_halves(args) if is_ray else nullcontext():
                _serve(args, pipeline, asker)
        finally:
            for keeper in keepers:
                keeper.stop()
    return 0


def _members(args: argparse.Namespace, front: str, folder: str) -> list[list[str]]:
    """The commands of the servers of this machine."""
    threads = args.threads or _share_of_cores(max(1, (args.vision or 0) + (args.language or 0)))
    common = ["serve", args.model, "--join", front, "--device", args.device]
    common += ["--threads", str(threads), "--weights", args.weights]
    if args.batch_invariant:
        common.append("--batch-invariant")
    vision = [*common, "--role", "vision"]
    language = [*common, "--role", "language", "--cache-bytes", str(args.cache_bytes)]
    if args.vllm is not None:
        language += ["--vllm", args.vllm, "--api-key-env", args.api_key_env]
        language += [] if args.served_model is None else ["--served-model", args.served_model]
    return [vision] * (args.vision or 0) + [
        [*language, "--features", f"ipc://{folder}/language{number}"]
        for number in range(args.language or 0)
    ]
