"""The last part of `make demo`: the same answers with fewer visual tokens (InternVL3.5-Flash).

The model learns to say with a quarter of a tile's visual tokens what it says with all of them
(ViCO, stage 1), and a router learns which tiles that costs nothing (stage 2). Both read boxes and
micro's own SFT mixture. A page of its own shows the scores and the tiles that were compressed; the
model is left beside the other one, which keeps all its tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cascadevl.eval.report import Report, write_report
from cascadevl.eval.tile_routes import RoutedAnswer, routed_answers
from cascadevl.model.checkpoint import configuration, open_checkpoint
from cascadevl.model.loading import load
from cascadevl.train.config import BatchConfig, DataConfig
from cascadevl.train.loop import RunConfig
from cascadevl.train.optim import OptimConfig
from cascadevl.train.router import router
from cascadevl.train.router_config import RouterConfig, RouterSection
from cascadevl.train.run import TrainResult
from cascadevl.train.vico import ViCOConfig, ViCOSection, vico
from cascadevl.workflows import boxes
from cascadevl.workflows.cascade_config import CascadeConfig
from cascadevl.workflows.cascade_stages import Place, placed_router, placed_vico
from cascadevl.workflows.demo_report import chat_commands, save_pictures
from cascadevl.workflows.demonstration import Demonstration, examine, train

MODEL, PAGE = "flash", "compressed.html"
"""What is left in the demo's folder."""

VICO_STEPS, ROUTER_STEPS = 120, 120

RECORDS = 960
"""Whose tiles are measured for the router."""

BOXES_SHARE = 0.3
"""Draws of boxes; the others are of what micro knew, whose larger pictures have several tiles."""

COUNTED, SHOWN = 20, 3
"""Questions of each row whose visual tokens are counted, and whose tiles are shown."""


def cascade_config(out: Path, *, model: str, steps_scale: float) -> CascadeConfig:
    """Visual consistency, then the router.

    Args:
        out: Folder of both.
        model: The model that keeps all its visual tokens.
        steps_scale: Factor on the number of steps and of measured records.
    """
    return CascadeConfig(
        model=model,
        stages=("vico", "router"),
        vico=_vico(max(2, round(VICO_STEPS * steps_scale))),
        router=_router(
            max(2, round(ROUTER_STEPS * steps_scale)), records=max(32, round(RECORDS * steps_scale))
        ),
        out=out,
    )


def compress(demo: Demonstration, model: Path, *, steps_scale: float) -> Path | None:
    """Train both stages, ask all questions again, and write the page.

    Args:
        demo: The demo, whose last examination was of this model.
        model: The model that keeps all its visual tokens.
        steps_scale: Factor on the number of steps.

    Returns:
        The page; None for a model that compresses tiles already.

    Raises:
        TrainingError: If a stage was asked to stop; the same demo goes on with it.
    """
    if configuration(open_checkpoint(model)).flash_mode:
        return None
    config = cascade_config(demo.out, model=str(model), steps_scale=steps_scale)
    sources, console = boxes.sources(BOXES_SHARE), demo.console
    place = Place(model=str(model), reference=str(model))
    first = placed_vico(config, place)
    trained = _trained(
        demo, "vico", first.run, lambda: vico(first, sources=sources, console=console)
    )
    second = placed_router(config, replace(place, model=str(trained)))
    trained = _trained(
        demo, "router", second.run, lambda: router(second, sources=sources, console=console)
    )
    flash = demo.out / MODEL
    shutil.copytree(trained, flash, dirs_exist_ok=True)

    asked = replace(demo, stages=[replace(demo.stages[-1], name="all tiles full")])
    student, processor = load(flash, dtype=torch.bfloat16)
    examine(asked, "all compressed", student, visual_budget="compressed")
    examine(asked, "router", student)
    scores = asked.stages[-1].scores
    routed = routed_answers(student, processor, scores, per_row=COUNTED)
    pictures = save_pictures(demo.stages[-1], demo.out / "pictures")
    demo.facts["visual tokens"] = tokens_left(routed)
    page = demo.out / PAGE
    threshold = student.config.flash_absolute_threshold
    assert threshold is not None, "the router was calibrated"
    write_report(_report(asked, routed, threshold, chat_commands(flash, pictures)), page)
    console.print(f"{demo.facts['visual tokens']}: {page}", highlight=False, soft_wrap=True)
    return page


def _trained(
    demo: Demonstration, stage: str, run: RunConfig, recipe: Callable[[], TrainResult]
) -> Path:
    """A stage; its loss is another quantity than those of the lesson, so it is not drawn."""
    return train(demo, stage, run.num_steps, lambda _: recipe(), folder=run.out, plots_loss=False)


def tokens_left(routed: Sequence[RoutedAnswer]) -> str:
    """The visual tokens that a router left, in words."""
    used = sum(sum(each.routes.tokens_per_tile) for each in routed)
    whole = sum(each.routes.full_tokens * len(each.routes.tokens_per_tile) for each in routed)
    tiles = sum(len(each.routes.compressed) for each in routed)
    compressed = sum(sum(each.routes.compressed) for each in routed)
    return (
        f"{100 * used / whole:.0f} % are left by the router, which compressed {compressed:,} of "
        f"{tiles:,} tiles (of {len(routed)} questions)"
    )


def to_show(routed: Sequence[RoutedAnswer]) -> list[RoutedAnswer]:
    """A few answers of each row, those whose pictures have most tiles first."""
    rows: dict[str, list[RoutedAnswer]] = {}
    for each in routed:
        rows.setdefault(each.row, []).append(each)
    few = [each for row in rows.values() for each in row[:SHOWN]]
    return sorted(few, key=lambda each: -len(each.routes.tokens_per_tile))


def _report(
    asked: Demonstration, routed: Sequence[RoutedAnswer], threshold: float, commands: str
) -> Report:
    names = ("vico", "router", "visual tokens")
    return Report(
        title="Fewer visual tokens",
        lead="The same questions with all tiles full, with a quarter of the visual tokens "
        "throughout, and with those tiles compressed to which the router gives a probability of "
        f"{threshold:.0%} or more. So short a training leaves much to be lost; what a longer one "
        "keeps is in docs/experiments.md.",
        stages=asked.stages,
        facts={name: asked.facts[name] for name in names},
        commands=commands,
        num_pictures=0,
        compare=True,
        routed=to_show(routed),
    )


def _vico(num_steps: int) -> ViCOConfig:
    return ViCOConfig(
        data=DataConfig(max_tokens=2048, jpeg=True, increment=1.0, prefetch=0),
        batch=BatchConfig(
            packing="fill",
            row_tokens=boxes.ROW_TOKENS,
            row_tiles=256,
            buffer_rows=8,
            level_rows=1,
            averaging="sample",
        ),
        optim=_optim(3e-4, warmup_ratio=0.03),
        vico=ViCOSection(compress=0.5, mixed=0.5),
        run=_run(num_steps),
    )


def _router(num_steps: int, *, records: int) -> RouterConfig:
    return RouterConfig(
        data=DataConfig(max_tokens=2048, jpeg=False, increment=1.0),
        batch=BatchConfig(packing="count", row_samples=32, row_tokens=boxes.ROW_TOKENS),
        optim=_optim(5e-4, warmup_ratio=0.05),
        router=RouterSection(records=records, held_out=0.2, chunk=32),
        run=_run(num_steps),
    )


def _optim(lr: float, *, warmup_ratio: float) -> OptimConfig:
    return OptimConfig(
        name="adamw", lr=lr, betas=(0.9, 0.95), warmup_ratio=warmup_ratio, schedule="cosine"
    )


def _run(num_steps: int) -> RunConfig:
    return RunConfig(
        num_steps=num_steps,
        seed=boxes.SEED,
        log_interval=4,
        eval_interval=max(1, num_steps // 5),
        checkpoint_interval=20,
        keep_last=1,
    )
