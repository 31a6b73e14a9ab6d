"""The models of the Flash experiment: one that reads the material, and what ViCO makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import flash_material as material
from experiment import CoreHours, finished, quiet
from flash_rules import ROUTERS

from cascadevl.losses.router import LabelForm
from cascadevl.train.config import TrainConfig
from cascadevl.train.optim import OptimConfig
from cascadevl.train.router import router
from cascadevl.train.router_config import RouterConfig
from cascadevl.train.sft import sft
from cascadevl.train.vico import ViCOConfig, vico

NOTED = 25
"""Steps between notes of the time that a run took so far."""

SAVED = 50
"""Steps between checkpoints: what a kill costs at most."""

BASE_SEED, CONSISTENCY_SEED, ROUTER_SEED = 100, 200, 300
"""Of training scenes; those of the runs of a seed are the sums of these and the seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the models come about.

    Attributes:
        out: Where everything is kept.
        model: The model it starts from.
        vico: Visual consistency.
        router: The router.
        base_steps: Steps in which the model learns to read the material; 0 takes it as it is.
    """

    out: Path
    model: str
    vico: ViCOConfig
    router: RouterConfig
    base_steps: int


def base_model(recipe: Recipe, hours: CoreHours) -> str:
    """The model that reads the material with all tiles full, trained unless it is there.

    Args:
        recipe: How.
        hours: Where the time is counted.
    """
    if not recipe.base_steps:
        return recipe.model
    consistent = recipe.vico
    config = TrainConfig(
        model=replace(consistent.model, path=recipe.model),
        data=replace(consistent.data, meta=()),
        batch=replace(consistent.batch, averaging="square"),
        optim=OptimConfig(  # as the demo teaches micro (cascadevl.workflows.boxes)
            name="muon",
            lr=5e-4,
            muon_lr=2e-3,
            betas=(0.9, 0.95),
            warmup_ratio=0.03,
            schedule="cosine",
            min_lr_ratio=0.02,
        ),
        run=replace(
            consistent.run,
            num_steps=recipe.base_steps,
            out=recipe.out / "base",
            resume=True,
            seed=0,
            eval_interval=NOTED,
            checkpoint_interval=SAVED,
        ),
    )
    if not (config.run.out / "model").exists():
        with hours.counted("base") as note:
            sources = material.sources(BASE_SEED)
            finished(sft(config, sources=sources, on_step=note, console=quiet()))
    return str(config.run.out / "model")


def routed_models(recipe: Recipe, base: str, seed: int, hours: CoreHours) -> dict[str, Path]:
    """The models of a seed, one for each of `ROUTERS`; they differ in their routers alone.

    Args:
        recipe: How.
        base: The model before visual consistency.
        seed: Of both stages.
        hours: Where the time is counted.
    """
    consistent = consistent_model(recipe, base, seed, hours)
    return {
        name: routed_model(recipe, base, consistent, seed, label, hours)
        for name, label in ROUTERS.items()
    }


def consistent_model(recipe: Recipe, base: str, seed: int, hours: CoreHours) -> Path:
    """The model of a seed after visual consistency, trained unless it is there."""
    run = replace(
        recipe.vico.run,
        out=recipe.out / f"{seed}" / "vico",
        resume=True,
        seed=seed,
        eval_interval=NOTED,
        checkpoint_interval=SAVED,
    )
    config = replace(
        recipe.vico,
        model=replace(recipe.vico.model, path=base),
        data=replace(recipe.vico.data, meta=()),
        run=run,
    )
    if not (run.out / "model").exists():
        with hours.counted("vico") as note:
            sources = material.sources(CONSISTENCY_SEED + seed)
            finished(vico(config, sources=sources, on_step=note, console=quiet()))
    return run.out / "model"


def routed_model(
    recipe: Recipe, base: str, consistent: Path, seed: int, label: LabelForm, hours: CoreHours
) -> Path:
    """The same with a router trained on labels of one form; all forms share one measurement."""
    folder = recipe.out / f"{seed}"
    run = replace(recipe.router.run, out=folder / f"router-{label}", resume=True, seed=seed)
    config = replace(
        recipe.router,
        model=replace(recipe.router.model, path=str(consistent)),
        data=replace(recipe.router.data, meta=()),
        router=replace(recipe.router.router, reference=base, label=label, store=folder / "losses"),
        run=run,
    )
    if not (run.out / "model").exists():
        with hours.counted(f"router of {label}") as note:
            sources = material.sources(ROUTER_SEED + seed)
            finished(router(config, sources=sources, on_step=note, console=quiet()))
    return run.out / "model"
