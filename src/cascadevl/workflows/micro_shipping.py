"""Micro as it is shipped: bfloat16 weights, tokenizer, processor, and a card made of its scores."""

from __future__ import annotations

from collections import defaultdict
from importlib.resources import files
from pathlib import Path

import jinja2
import torch

from cascadevl.errors import CheckpointError, ConfigError
from cascadevl.model.loading import load, save
from cascadevl.model.shipped import CARD, EDITION_KEY
from cascadevl.model.tensor_files import new_folder
from cascadevl.workflows import micro
from cascadevl.workflows.micro_examination import Examination, table, weights_checksum

PICTURE_STAGES = ("pretrain", "sft", "anneal")
"""The stages in which both halves learn together."""

MAX_BYTES = 25_000_000
"""Largest folder that is shipped: it lies in the repository and in every installed copy."""


def ship(model: Path, out: Path, *, edition: int, scores: Examination) -> Path:
    """Write the folder that the package ships.

    Args:
        model: The trained model.
        out: Folder to make; it appears complete or not at all.
        edition: Which edition this is, from 1.
        scores: What this very model scored.

    Returns:
        ``out``.

    Raises:
        CheckpointError: If ``out`` exists and is not empty, or would be too large.
        ConfigError: If the edition is none, or the scores are those of other weights.
    """
    if edition < 1:
        raise ConfigError(f"edition {edition} is none; the first is 1")
    found = weights_checksum(model)
    if found != scores.weights:
        raise ConfigError(
            f"the scores are those of other weights (checksum {scores.weights[:12]}) than {model} "
            f"holds ({found[:12]}); examine this model and ship it with those scores"
        )
    loaded, processor = load(model, dtype=torch.bfloat16)
    num_parameters = sum(parameter.numel() for parameter in loaded.parameters())
    with new_folder(out) as folder:
        whole = folder / "checkpoint"
        save(loaded, processor, whole)
        for file in whole.iterdir():
            file.rename(folder / file.name)
        whole.rmdir()
        card = model_card(edition=edition, scores=scores, num_parameters=num_parameters)
        (folder / CARD).write_text(card, "utf-8")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if size > MAX_BYTES:
            raise CheckpointError(
                f"the shipped folder would take {size:,} bytes, and at most {MAX_BYTES:,} are "
                "shipped; ship a smaller model"
            )
    return out


def model_card(*, edition: int, scores: Examination, num_parameters: int) -> str:
    """The card: scores, training, held-out rule, limits, and the licence of every source.

    Args:
        edition: Which edition this is.
        scores: What the model scored.
        num_parameters: Of the whole model.
    """
    source = files("cascadevl").joinpath("assets/model_card.md.jinja").read_text("utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(
        edition_key=EDITION_KEY,
        edition=edition,
        parameters=f"{num_parameters / 1e6:.1f}",
        scores=table(scores).rstrip(),
        num_questions=scores.num_questions,
        num_seeds=len(scores.seeds),
        seeds=", ".join(map(str, scores.seeds)),
        stages=[
            {"name": name, "steps": f"{plan.num_steps:,}", "tokens": f"{plan.row_tokens:,}"}
            for name, plan in micro.STAGES.items()
        ],
        families=_families(),
    )


def _families() -> list[dict[str, str]]:
    """The share of every family in the stages on pictures, in percent of the draws."""
    shares: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for stage in PICTURE_STAGES:
        sources = micro.sources(stage)
        total = sum(weighted.weight or 0.0 for weighted in sources)
        for weighted in sources:
            family = weighted.source.name.split()[0]
            share = (weighted.weight or 0.0) / total
            shares[family][stage] = shares[family].get(stage, 0.0) + share
    return [
        {"name": family} | {stage: f"{100 * of.get(stage, 0.0):.0f}" for stage in PICTURE_STAGES}
        for family, of in shares.items()
    ]
