"""The best of several answers: how many, by what, and the reward model that is loaded for it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cascadevl.cli.arguments import positive_int
from cascadevl.errors import ConfigError

if TYPE_CHECKING:
    from cascadevl.engine.best_of_n import BestOfConfig, Select
    from cascadevl.engine.critics import Critics
    from cascadevl.engine.engine import Engine
    from cascadevl.engine.process_reward import ProcessRewardConfig

NUM_SAMPLES = 8
"""N where a reward model is named and no N (both reports)."""


def add_best_of(parser: argparse.ArgumentParser) -> None:
    """Describe all arguments.

    Args:
        parser: Gets them, and has ``--device``.
    """
    group = parser.add_argument_group("the best of several answers")
    group.add_argument(
        "--best-of",
        type=positive_int,
        metavar="N",
        help="draw N answers and give one (8 with --reward-model); needs a --temperature, 0.7 in "
        "the reports",
    )
    group.add_argument(
        "--select",
        choices=("prm", "outcome", "vote"),
        help="by the steps of an answer, by the answer as a whole, or what most of them say "
        "(default: prm with --reward-model, else vote)",
    )
    group.add_argument(
        "--round-size",
        type=positive_int,
        metavar="K",
        help="draw K at a time, and stop when the choice is settled (default: all at once)",
    )
    group.add_argument(
        "--stop-score",
        type=float,
        metavar="X",
        help="an answer of this score is good enough to stop at, from 0 to 1",
    )
    add_reward_model(group)


def add_reward_model(group: argparse._ArgumentGroup) -> None:
    """Describe the arguments of the reward model alone.

    Args:
        group: Gets them.
    """
    group.add_argument(
        "--reward-model",
        metavar="MODEL",
        help="process reward model: a checkpoint, or an adapter of the model that answers, which "
        "then shares its weights and what it has seen",
    )
    group.add_argument(
        "--step-lines", action="store_true", help="every line is a step, not every paragraph"
    )
    group.add_argument(
        "--reward-chunk",
        type=positive_int,
        metavar="N",
        help="answers that are judged in one forward, for less memory (default: all that fit)",
    )


def wanted_best(args: argparse.Namespace) -> BestOfConfig | None:
    """How many answers are drawn, and by what one is chosen; None for an answer as it comes.

    Args:
        args: With those of `add_best_of`.

    Raises:
        ConfigError: If wishes exclude each other.
    """
    from cascadevl.engine.best_of_n import BestOfConfig

    has_model = args.reward_model is not None
    if args.best_of is None and not has_model:
        needless = ("select", "round_size", "stop_score", "reward_chunk")
        for name in needless:
            if getattr(args, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} chooses among several answers; say --best-of N too")
        return None
    select: Select = args.select or ("prm" if has_model else "vote")
    if has_model and select == "vote":
        raise ConfigError("--select vote reads no --reward-model; leave one of them out")
    return BestOfConfig(
        num_samples=args.best_of or NUM_SAMPLES,
        select=select,
        round_size=args.round_size,
        stop_score=args.stop_score,
    )


def critics_beside(
    args: argparse.Namespace, engine: Engine | None, *, shares_features: bool = True
) -> Critics:
    """The reward model that the arguments name, if they do.

    Args:
        args: With those of `add_reward_model`, and ``device``.
        engine: Of the model that answers, if it is in this process: an adapter of that model shares
            it.
        shares_features: See `cascadevl.engine.critics.adapter_critics`.

    Raises:
        CheckpointError: If the reward model cannot be opened.
        ConfigError: If it is an adapter, and the weights of its base are packed.
    """
    from cascadevl.engine.critics import Critics, adapter_critics, critics_of

    if args.reward_model is None:
        return Critics()
    import cascadevl
    from cascadevl.cli.chat import usable_device
    from cascadevl.model.adapter_files import is_adapter_folder, is_adapter_of
    from cascadevl.model.loading import find

    folder, config = find(args.reward_model), _scoring(args)
    if (
        engine is not None
        and is_adapter_folder(folder)
        and (engine.is_packed or is_adapter_of(engine.model, folder))
    ):
        return adapter_critics(engine, folder, config, shares_features=shares_features)
    model, processor = cascadevl.load(folder, device=usable_device(args.device))
    return critics_of(model, processor, config)


def _scoring(args: argparse.Namespace) -> ProcessRewardConfig:
    from cascadevl.engine.process_reward import ProcessRewardConfig
    from cascadevl.scoring.steps import StepRules

    rules = StepRules(separator="\n" if args.step_lines else "\n\n")
    return ProcessRewardConfig(rules=rules, chunk=args.reward_chunk)


def best_of_facts(args: argparse.Namespace) -> dict[str, object]:
    """What a choice depends on beside its numbers, for journals; nothing without a reward model.

    Args:
        args: With those of `add_reward_model`.
    """
    if args.reward_model is None:
        return {}
    return {"reward_model": args.reward_model, "step_lines": args.step_lines}
