"""``make nano``: a model trained from scratch, examined before and after each stage, shown."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from cascadevl.eval.report import Report
from cascadevl.model.loading import load
from cascadevl.train.config import ModelConfig
from cascadevl.train.pretrain import pretrain
from cascadevl.train.run import TrainResult
from cascadevl.train.sft import sft
from cascadevl.train.start import from_scratch
from cascadevl.workflows import nano
from cascadevl.workflows.demo_report import course_plots, num_parameters
from cascadevl.workflows.demonstration import Demonstration, Watch, begin, examine, finish, train

CURVE_QUESTIONS = 60
"""Questions of each row in the small examinations during training."""

ANSWER_TOKENS = 32
"""Longest answer asked for: all of the suite's answers are shorter."""


def run(
    *,
    out: Path,
    steps_scale: float = 1.0,
    num_questions: int = 400,
    console: Console | None = None,
) -> Path:
    """Train nano from scratch, examine it, write the report.

    Args:
        out: The demo's folder. One that holds a finished demo is kept under another name; one
            that holds a demo which was interrupted is gone on with.
        steps_scale: Factor on all numbers of steps.
        num_questions: Held-out questions of each row.
        console: Where progress is shown.

    Returns:
        The report.

    Raises:
        TrainingError: If a stage was asked to stop; the same call goes on with it. Or if the
            folder holds an interrupted demo of other settings.
    """
    console = console or Console()
    course = begin(out, console)
    tokenizer = nano.tokenizer()
    model, processor = from_scratch(ModelConfig(preset="nano"), tokenizer, seed=nano.SEED)
    demo = Demonstration(
        out=out,
        rows=nano.suite(num_questions),
        curve_rows=nano.suite(min(CURVE_QUESTIONS, num_questions)),
        answer_tokens=ANSWER_TOKENS,
        processor=processor,
        course=course,
        console=console,
    )
    demo.facts["model"] = (
        f"nano, {num_parameters(model.model.vision_tower)} of vision, {num_parameters(model)} in "
        f"all, {len(tokenizer)} tokens, from random weights"
    )
    console.rule("before training")
    examine(demo, "untrained", model)

    path: Path | None = None
    lengths = {"pretrain": nano.PRETRAIN_STEPS, "sft": nano.SFT_STEPS}
    for stage, length in lengths.items():
        path = _train(demo, stage, max(2, round(length * steps_scale)), tokenizer, path)
        model, _ = load(str(path), dtype=torch.bfloat16)
        examine(demo, f"after {stage}", model)
    assert path is not None
    return finish(demo, path, lambda commands: _report(demo, commands))


def _train(
    demo: Demonstration,
    stage: str,
    num_steps: int,
    tokenizer: PreTrainedTokenizerFast,
    start: Path | None,
) -> Path:
    config = nano.stage_config(stage, demo.out / stage, num_steps=num_steps, model=start)

    def recipe(watch: Watch) -> TrainResult:
        if stage == "pretrain":
            return pretrain(
                config,
                sources=nano.pretrain_sources(),
                tokenizer=tokenizer,
                on_step=watch,
                console=demo.console,
            )
        return sft(config, sources=nano.sft_sources(), on_step=watch, console=demo.console)

    return train(demo, stage, num_steps, recipe)


def _report(demo: Demonstration, commands: str) -> Report:
    return Report(
        title="From a picture to a trained answer",
        lead="A model of the InternVL architecture, trained from random weights on handwriting, "
        "shapes and easy-VQA through pre-training and SFT, and asked about pictures it never saw.",
        stages=demo.stages,
        plots=course_plots(
            demo.course.curves(),
            demo.losses,
            marks=demo.ends[:-1],
            curve_note="A small examination a point, with other held-out questions than in the "
            "table; the dashed line is where pre-training ends and SFT begins.",
            loss_note="Pre-training also predicts descriptions, so the two stages' losses are not "
            "of the same text.",
        ),
        facts=demo.facts,
        commands=commands,
    )
