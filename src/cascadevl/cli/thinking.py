"""How much is to be reasoned before an answer: the arguments of commands that ask a model."""

from __future__ import annotations

import argparse

from cascadevl.errors import ConfigError


def add_thinking(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Describe the arguments.

    Args:
        parser: Gets them.
    """
    parser.add_argument(
        "--thinking", choices=("on", "off"), help="whether to reason first (default: the model's)"
    )
    parser.add_argument(
        "--force-thinking",
        action="store_true",
        help="begin the answer so that --thinking is certain, not asked for only",
    )
    parser.add_argument(
        "--thinking-budget",
        type=int,
        metavar="N",
        help="most tokens of reasoning; then the answer is asked for (default: no limit)",
    )


def opening_of(args: argparse.Namespace) -> str:
    """What answers begin with that their prompts hold already: nothing, or the word of reasoning.

    Args:
        args: With those of `add_thinking`.

    Raises:
        ConfigError: If what is forced is not said, or reasoning that is off has a budget.
    """
    if args.force_thinking and args.thinking is None:
        raise ConfigError("--force-thinking needs --thinking on, or off: what is to be certain?")
    if args.thinking == "off" and args.thinking_budget is not None:
        raise ConfigError("--thinking off leaves nothing to budget; leave out --thinking-budget")
    return "<think>\n" if args.force_thinking and args.thinking == "on" else ""
