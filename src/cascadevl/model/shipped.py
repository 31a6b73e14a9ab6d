"""The checkpoints that are part of the package, so that everything works with no download."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import yaml

from cascadevl.errors import CheckpointError

SHIPPED = ("micro",)
"""Their names, which stand wherever a checkpoint is named."""

ASSETS = Path(str(files("cascadevl").joinpath("assets")))
"""Where they are, each in a folder of its name."""

CARD = "README.md"
"""The model card within a checkpoint folder."""

EDITION_KEY = "cascadevl_edition"
"""In a card's front matter: which edition of a shipped model this is, from 1."""


def shipped_folder(name: str) -> Path:
    """The folder of a checkpoint that came with the package.

    Args:
        name: One of `SHIPPED`.

    Raises:
        CheckpointError: If this copy of the package lacks it.
    """
    path = ASSETS / name
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"the model {name!r} belongs to the package, but {path} does not hold it; install "
            f"cascadevl again, or train the model with `cascadevl {name}` and name its folder"
        )
    return path


def edition(path: Path) -> int | None:
    """Which edition of a shipped model a checkpoint folder holds; None for any other model.

    A model that was trained further from a shipped one has no card and so no edition.

    Args:
        path: The checkpoint folder.
    """
    card = path / CARD
    if not card.is_file():
        return None
    opening, front, *_ = [*card.read_text("utf-8").split("---\n", 2), ""]
    if opening:
        return None
    values = yaml.safe_load(front)
    number = values.get(EDITION_KEY) if isinstance(values, dict) else None
    return number if isinstance(number, int) else None
