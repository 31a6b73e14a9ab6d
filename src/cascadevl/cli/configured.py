"""Commands that are told everything by configuration files and keys that override them."""

from __future__ import annotations

import argparse
from typing import TypeVar

Schema = TypeVar("Schema")


def add_configuration(parser: argparse.ArgumentParser, examples: str) -> None:
    """Take files, overrides and ``--print_config``.

    Args:
        parser: Of the command.
        examples: Keys that are often overridden, for its help.
    """
    parser.usage = f"{parser.prog} CONFIG.yaml [...] [key=value ...] [--print_config]"
    parser.add_argument(
        "words",
        nargs="+",
        metavar="CONFIG.yaml | key=value",
        help=f"configuration files, and keys that override them, such as {examples}",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the whole configuration and stop"
    )


def configuration(args: argparse.Namespace, schema: type[Schema]) -> Schema | None:
    """What the command is told; None once it has printed it, as it was asked to.

    Args:
        args: Of a command with `add_configuration`.
        schema: Dataclass of the configuration.

    Raises:
        ConfigError: If a file or a key is wrong.
    """
    from cascadevl.config import dump_config, load_config

    files = [word for word in args.words if "=" not in word]
    overrides = [word for word in args.words if "=" in word]
    config = load_config(schema, files=files, overrides=overrides)
    if not args.print_config:
        return config
    print(dump_config(config), end="")
    return None
