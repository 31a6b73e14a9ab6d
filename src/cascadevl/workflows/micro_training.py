"""``make micro``: the whole training of the shipped model, stage by stage, resumable at any point.

Every stage has a run folder of its own and is left out once its model is there. The vision tower
and the decoder do not need each other, so two processes may train them side by side, each on a
core of its own, by naming a stage.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from cascadevl.errors import ConfigError, TrainingError
from cascadevl.model.loading import load
from cascadevl.tasks.pages import CLASSES
from cascadevl.train.pretrain import pretrain
from cascadevl.train.run import MODEL, TrainResult
from cascadevl.train.sft import sft
from cascadevl.train.vision import pretrain_vision
from cascadevl.workflows import micro
from cascadevl.workflows.course import Course
from cascadevl.workflows.watching import watcher

CURVE_SEED = 8
CURVE_QUESTIONS = 40
"""Questions of each row in the small examinations during training."""

ANSWER_TOKENS = 192
"""Longest answer asked for: reading a chart up to the last of seven long names takes about 170."""

GOES_ON_FROM: dict[str, tuple[str, ...]] = {
    "vision": (),
    "reading": ("vision",),
    "decoder": (),
    "pretrain": ("decoder", "reading"),
    "sft": ("pretrain",),
    "anneal": ("sft",),
}
"""The stages whose models each stage starts from."""

JOINED = "joined"
"""Folder of the whole before its first joint step."""


def run(
    out: Path,
    *,
    stages: tuple[str, ...] = tuple(micro.STAGES),
    steps_scale: float = 1.0,
    console: Console | None = None,
) -> Path:
    """Train the stages that are not done yet, in order.

    Args:
        out: Folder of all stages.
        stages: Which ones; keys of `micro.STAGES`.
        steps_scale: Factor on all numbers of steps.
        console: Where progress is shown.

    Returns:
        The model of the last stage.

    Raises:
        ConfigError: If a stage is not known, or needs one that is not done.
        TrainingError: If a stage was asked to stop; the same call goes on with it.
    """
    if not stages or not set(stages) <= set(micro.STAGES):
        raise ConfigError(f"the stages are {', '.join(micro.STAGES)}; not {', '.join(stages)}")
    for stage in stages:
        path = out / stage / MODEL
        if path.exists():
            continue
        result = _train(stage, out, steps_scale, console or Console())
        if result.model_path is None:
            raise TrainingError(
                f"stopped in {stage} after step {result.steps}; the same command goes on"
            )
    return out / stages[-1] / MODEL


def _train(stage: str, out: Path, steps_scale: float, console: Console) -> TrainResult:
    """One stage, from the model it starts from."""
    start = _start_of(stage, out)
    config = micro.stage_config(stage, out / stage, model=start, steps_scale=steps_scale)
    console.rule(f"{stage}: {config.run.num_steps} steps")
    if stage in micro.VISION_STAGES:
        return pretrain_vision(
            config,
            pages=micro.pages(stage),
            num_classes=len(CLASSES),
            tokenizer=micro.tokenizer(),
            console=console,
        )
    sources = micro.sources(stage)
    if stage == "decoder":
        return pretrain(config, sources=sources, tokenizer=micro.tokenizer(), console=console)
    course = Course(out / "course.json")
    course.begin_stage(stage, config.run.num_steps)
    recipe = pretrain if stage == "pretrain" else sft
    _, processor = load(out / JOINED)
    watch = watcher(
        stage,
        course,
        processor,
        micro.suite(CURVE_QUESTIONS),
        seed=CURVE_SEED,
        answer_tokens=ANSWER_TOKENS,
        console=console,
    )
    result = recipe(config, sources=sources, on_step=watch, console=console)
    course.stop(stage)
    return result


def _start_of(stage: str, out: Path) -> Path | None:
    """The model a stage goes on with; None where it begins with random weights."""
    needed = [out / name / MODEL for name in GOES_ON_FROM[stage]]
    if missing := [str(path) for path in needed if not path.exists()]:
        raise ConfigError(f"stage {stage} needs {' and '.join(missing)}, which is not there yet")
    if len(needed) < 2:
        return needed[0] if needed else None
    decoder, vision = needed
    joined = out / JOINED
    return joined if joined.exists() else micro.join_halves(decoder, vision, joined)
