"""``cascadevl train STAGE``: a training run from a YAML file and overrides."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascadevl.cli.arguments import Subparsers

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from cascadevl.train.config import TrainConfig
    from cascadevl.train.run import TrainResult
    from cascadevl.workflows.dry_run import SeenSample

NUM_SAMPLES = 3
STOPPED = 1

STAGES = {
    "pretrain": "native multimodal pre-training: all text of a sample is learned",
    "posthoc": "the route that native pre-training replaces: the projector alone, then everything",
    "sft": "supervised fine-tuning: only answers are learned",
    "mpo": "mixed preference optimisation: which of two answers is better",
    "gspo": "reinforcement learning: answers better than others to the same question",
    "prm": "a process reward model: is a solution right up to each of its steps",
    "vico": "visual consistency: the same answers with compressed tiles as with full ones",
    "router": "the router of a Flash model: which tiles can do with fewer visual tokens",
}
_OWN_OPTIONS = (
    *("--help", "--model", "--data", "--questions", "--out", "--resume"),
    *("--print_config", "--dry-run"),
)
_LORA = "--lora"  # this word alone; --lora=null and --lora.rank are overrides
_EPILOG = (
    "Any key of the configuration can be given as --key.sub value, for example --optim.lr 5e-6, "
    "and overrides the files; --print_config shows all keys."
)


class StageParser(argparse.ArgumentParser):
    """Takes its own options and leaves ``--key.sub value`` to the configuration."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse as argparse does, with the overrides set apart first."""
        own, overrides = split_words(args or ())
        namespace, rest = super().parse_known_args(own, namespace)
        namespace.overrides = overrides
        return namespace, rest


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the words of a command line into the command's own and overrides of configuration keys.

    Args:
        words: Everything after the stage's name.
    """
    own: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if not name.startswith("--") or name in _OWN_OPTIONS or word == _LORA:
            own.append(word)
            continue
        overrides.append(word)
        if not equals and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return own, overrides


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command and its stages."""
    parser = subparsers.add_parser(
        "train", help="train a model", description="Train a model: choose a stage."
    )
    stages = parser.add_subparsers(
        title="stages", metavar="STAGE", required=True, parser_class=StageParser
    )
    for stage, description in STAGES.items():
        _add_options(
            stages.add_parser(
                stage,
                help=description,
                description=description.capitalize() + ".",
                epilog=_EPILOG,
                usage=f"cascadevl train {stage} [CONFIG.yaml ...] [options] [--key.sub value ...]",
                allow_abbrev=False,
            ),
            stage,
        )


def _add_options(parser: argparse.ArgumentParser, stage: str) -> None:
    parser.add_argument(
        "configs",
        nargs="*",
        type=Path,
        metavar="CONFIG.yaml",
        help="configuration files; a later one changes single keys of an earlier one",
    )
    parser.add_argument("--model", metavar="DIR", help="model to start from (model.path)")
    parser.add_argument(
        "--data",
        metavar="META.json",
        action="append",
        help="meta file that lists data sets (data.meta); may be given several times",
    )
    if stage == "gspo":
        parser.add_argument(
            "--questions",
            metavar="FILE.jsonl",
            help="file of questions and answers (problems.file)",
        )
    parser.add_argument("--out", metavar="DIR", help="run folder (run.out)")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the run folder's last checkpoint"
    )
    parser.add_argument(
        _LORA,
        action="store_true",
        help="train small adapters instead of the weights; --lora.rank 8 and so on change it",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the whole configuration and stop"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help=f"print the first {NUM_SAMPLES} samples as the model will see them and stop",
    )
    parser.set_defaults(run=run, stage=stage, questions=None)


def run(args: argparse.Namespace) -> int:
    """Train, or show what would be trained on."""
    from cascadevl.config import dump_config

    config = read_config(args)
    if args.print_config:
        print(dump_config(config), end="")
        return 0
    if args.dry_run:
        return _dry_run(config)
    return _train(args.stage, config)


def read_config(args: argparse.Namespace) -> TrainConfig:
    """The run's configuration: files, then the short options, then the overrides."""
    from cascadevl.config import load_config
    from cascadevl.train.config import TrainConfig
    from cascadevl.train.gspo_config import GSPOConfig
    from cascadevl.train.mpo import MPOConfig
    from cascadevl.train.posthoc import PosthocConfig
    from cascadevl.train.prm import PRMConfig
    from cascadevl.train.router_config import RouterConfig
    from cascadevl.train.vico import ViCOConfig

    own: dict[str, type[TrainConfig]] = {
        "posthoc": PosthocConfig,
        "mpo": MPOConfig,
        "gspo": GSPOConfig,
        "prm": PRMConfig,
        "vico": ViCOConfig,
        "router": RouterConfig,
    }
    kind = own.get(args.stage, TrainConfig)
    short = []
    if args.model is not None:
        # A model to start from replaces a preset that a file names.
        short += [f"model.path={args.model}", "model.preset=null"]
    if args.data:
        short.append(f"data.meta={list(args.data)}")
    if args.questions is not None:
        short.append(f"problems.file={args.questions}")
    if args.out is not None:
        short.append(f"run.out={args.out}")
    if args.resume:
        short.append("run.resume=true")
    if args.lora:
        short.append("lora=true")
    return load_config(kind, files=args.configs, overrides=[*short, *args.overrides])


def _train(stage: str, config: TrainConfig) -> int:
    from accelerate import PartialState

    result = _trained(stage, config)
    state = PartialState()
    if state.is_main_process:
        print_result(result)
    state.destroy_process_group()
    return 0 if result.finished else STOPPED  # the log says how to go on


def _trained(stage: str, config: TrainConfig) -> TrainResult:
    from cascadevl.train.gspo import gspo
    from cascadevl.train.gspo_config import GSPOConfig
    from cascadevl.train.mpo import MPOConfig, mpo
    from cascadevl.train.posthoc import PosthocConfig, posthoc
    from cascadevl.train.pretrain import pretrain
    from cascadevl.train.prm import PRMConfig, prm
    from cascadevl.train.router import router
    from cascadevl.train.router_config import RouterConfig
    from cascadevl.train.sft import sft
    from cascadevl.train.vico import ViCOConfig, vico

    if isinstance(config, PosthocConfig):
        return posthoc(config)
    if isinstance(config, MPOConfig):
        return mpo(config)
    if isinstance(config, GSPOConfig):
        return gspo(config)
    if isinstance(config, PRMConfig):
        return prm(config)
    if isinstance(config, ViCOConfig):
        return vico(config)
    if isinstance(config, RouterConfig):
        return router(config)
    return {"pretrain": pretrain, "sft": sft}[stage](config)


def print_result(result: TrainResult) -> None:
    """Print what was left out, and where the model is.

    Args:
        result: Of the run.
    """
    for (dataset, kind), count in sorted(result.skipped.items()):
        print(f"left out: {count} x {kind} of {dataset}", file=sys.stderr)
    if not result.finished:
        return
    print(f"{result.steps} steps, loss {result.loss:.4f}; the model is in {result.model_path}")
    if result.adapter_path not in (None, result.model_path):
        print(f"the adapter alone is in {result.adapter_path}")


def _dry_run(config: TrainConfig) -> int:
    from rich.console import Console

    from cascadevl.errors import DataError
    from cascadevl.workflows.dry_run import MAX_DRAWS, first_samples

    console = Console()
    num_seen = 0
    for sample in first_samples(config, NUM_SAMPLES):
        if isinstance(sample, DataError):
            console.print(f"left out: {sample}\n", style="red", markup=False, highlight=False)
            continue
        num_seen += 1
        print_sample(num_seen, sample, console)
    if not num_seen:
        raise DataError(
            f"none of the first {MAX_DRAWS} records drawn can be used",
            kind="no_sample",
            remedy="run `cascadevl data check` on the meta file",
        )
    return 0


def print_sample(number: int, sample: SeenSample, console: Console) -> None:
    """Print one sample: its sizes, its images, and its text with the trained parts marked.

    Args:
        number: Counted from 1.
        sample: The sample.
        console: Where to print.
    """
    console.rule(f"sample {number}: {sample.source} ({sample.dataset})")
    console.print(
        f"{sample.num_tokens:,} tokens, {sample.num_trained:,} of them trained; "
        f"positions 0 to {sample.last_position:.12g}",
        highlight=False,
    )
    for index, image in enumerate(sample.images, start=1):
        console.print(
            f"image {index}: {image.num_tiles} tile{'s' * (image.num_tiles != 1)}, "
            f"{image.num_tokens:,} visual tokens, increment {image.increment:.12g}, "
            f"positions {image.first_position:.12g} to {image.last_position:.12g}",
            highlight=False,
        )
    console.print(marked_text(sample), soft_wrap=True)


def marked_text(sample: SeenSample) -> Text:
    """The text with trained stretches in green between ⟦ and ⟧, and slots with their sizes.

    Args:
        sample: The sample.
    """
    from rich.text import Text

    from cascadevl.data.conversation import IMAGE_CONTEXT

    text, images, segment = Text(), iter(sample.images), 0
    for span in sample.spans:
        if span.segment != segment:
            segment = span.segment
            text.append(f"\n── branch {segment} ──\n", style="bold blue")
        if span.trained:
            text.append(f"⟦{span.text}⟧", style="bold green")
            continue
        first, *others = span.text.split(IMAGE_CONTEXT)
        text.append(first, style="dim")
        for other in others:
            text.append(f"{IMAGE_CONTEXT} x {next(images).num_tokens}", style="bold magenta")
            text.append(other, style="dim")
    return text
