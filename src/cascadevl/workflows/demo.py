"""``make demo``: micro answers at once, is taught something new, reinforced in it, and shrunk.

The new family is one that micro was not trained on: boxes (`cascadevl.workflows.boxes`). It is
fine-tuned on them, then goes through both kinds of reinforcement, MPO and GSPO. The old families
are asked about before and after each, since teaching can also make a model forget. In the end a
copy learns to do with fewer visual tokens (`cascadevl.workflows.boxes_flash`).
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cascadevl.engine.packed_weights import can_pack
from cascadevl.errors import DataError
from cascadevl.eval.report import Report, StageScores, write_report
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import run_suite
from cascadevl.model.loading import find, load
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.shipped import edition
from cascadevl.train.gspo import gspo
from cascadevl.train.gspo_config import GSPOConfig
from cascadevl.train.mpo import MPOConfig, mpo
from cascadevl.train.run import TrainResult
from cascadevl.train.sft import sft
from cascadevl.workflows import boxes, boxes_flash, micro
from cascadevl.workflows.boxes_reinforcement import cascade_config
from cascadevl.workflows.cascade_stages import Place, placed_gspo, placed_mpo, run_stage
from cascadevl.workflows.demo_report import course_plots, minutes, num_parameters
from cascadevl.workflows.demonstration import Demonstration, Watch, begin, examine, finish, train

ANSWER_TOKENS = 192
"""Longest answer asked for: boxes of six shapes and charts read up to their last value fit."""

CURVE_QUESTIONS = 25
"""Questions of each row in the small examinations during training."""

PAGE = "answers.html"
PAGE_SEED = 11
PAGE_QUESTIONS = 5
"""The page that is there at once: so many pictures of each family."""

STAGE = "boxes"
"""Folder of the fine-tuning."""


def run(
    *,
    out: Path,
    model: str = "micro",
    steps_scale: float = 1.0,
    num_questions: int = 200,
    console: Console | None = None,
) -> Path:
    """Let micro answer, teach it boxes, reinforce and compress it, examine it all along, report.

    Args:
        out: The demo's folder. One that holds a finished demo is kept under another name; one
            that holds a demo which was interrupted is gone on with.
        model: What to start from: a name or a folder.
        steps_scale: Factor on the number of steps.
        num_questions: Held-out questions of each row.
        console: Where progress is shown.

    Returns:
        The report.

    Raises:
        CheckpointError: If the model cannot be loaded.
        TrainingError: If the training was asked to stop; the same call goes on with it. Or if
            the folder holds an interrupted demo of other settings.
    """
    began = time.perf_counter()
    console = console or Console()
    folder = find(model)
    course = begin(out, console)
    loaded, processor = load(folder, dtype=torch.bfloat16)
    demo = Demonstration(
        out=out,
        rows=boxes.suite(num_questions),
        curve_rows=boxes.curve_suite(min(CURVE_QUESTIONS, num_questions)),
        answer_tokens=ANSWER_TOKENS,
        processor=processor,
        course=course,
        console=console,
        compare=True,
    )
    number = edition(folder)
    name = str(model) if number is None else f"{model}, edition {number}"
    demo.facts["model"] = (
        f"{name}: {num_parameters(loaded.model.vision_tower)} of vision, "
        f"{num_parameters(loaded)} in all"
    )
    console.rule(name)
    num_answers = _answer_a_page(demo, loaded)
    demo.facts["first answers"] = (
        f"{num_answers} pictures, {time.perf_counter() - began:.0f} s after the start"
    )
    console.print(demo.facts["first answers"], highlight=False)
    console.rule("before the lesson")
    examine(demo, "before", loaded)

    num_steps = max(2, round(boxes.NUM_STEPS * steps_scale))
    config = boxes.train_config(out / STAGE, model=str(folder), num_steps=num_steps)
    path = train(
        demo,
        STAGE,
        num_steps,
        lambda watch: sft(config, sources=boxes.sources(), on_step=watch, console=console),
    )
    taught, _ = load(path, dtype=torch.bfloat16)
    examine(demo, "SFT", taught)
    path = _reinforce(demo, path, steps_scale, packs=can_pack(taught))
    page = boxes_flash.compress(demo, path, steps_scale=steps_scale)
    pages = {} if page is None else {"The same with fewer visual tokens": page.name}
    return finish(demo, path, lambda commands: replace(_report(demo, name, commands), pages=pages))


def _reinforce(demo: Demonstration, model: Path, steps_scale: float, *, packs: bool) -> Path:
    """MPO, then GSPO, with an examination after each; returns the last model."""
    config = cascade_config(
        demo.out,
        model=str(model),
        steps_scale=steps_scale,
        precision="packed" if packs else None,
    )
    place = Place(model=str(model))
    for stage in config.ordered:
        if stage not in ("mpo", "gspo"):
            demo.console.rule(stage)
            demo.course.start(stage)
            try:
                place = run_stage(config, stage, place, demo.console).place
            except DataError as error:
                if error.kind != "no_sample":
                    raise
                # After very few steps nothing is right yet, or everything is wrong.
                demo.facts["reinforcement"] = f"left out: {error}"
                demo.console.print(demo.facts["reinforcement"], highlight=False, markup=False)
                break
            finally:
                demo.course.stop(stage)
            demo.facts[stage] = minutes(demo.course.seconds[stage])
            continue
        run = placed_mpo(config, place) if stage == "mpo" else placed_gspo(config, place)
        recipe = partial(_recipe, run, demo.console)
        path = train(
            demo,
            stage,
            run.run.num_steps,
            recipe,
            folder=run.run.out,
            plots_loss=stage == "mpo",
        )
        place = replace(place, model=str(path))
        learned, _ = load(path, dtype=torch.bfloat16)
        examine(demo, stage.upper(), learned)
    assert place.model is not None
    return Path(place.model)


def _recipe(run: MPOConfig | GSPOConfig, console: Console, watch: Watch) -> TrainResult:
    if isinstance(run, MPOConfig):
        return mpo(run, on_step=watch, console=console)
    return gspo(run, on_step=watch, console=console)


def _answer_a_page(demo: Demonstration, model: CascadeVLForConditionalGeneration) -> int:
    """A few held-out pictures of all that micro knows, answered before anything is trained."""
    responder = ModelResponder(model=model, processor=demo.processor, max_new_tokens=ANSWER_TOKENS)
    scores = run_suite(responder, micro.suite(PAGE_QUESTIONS), seed=PAGE_SEED)
    table = Table("question", "answer", title="pictures it never saw", title_justify="left")
    for score in scores:
        answered = score.answered[0]
        prompt = answered.asked.question.prompt.splitlines()[-1]
        said = answered.response.splitlines()[-1] if answered.response else "(nothing)"
        answer = Text(f"{'✓' if answered.right else '✗'} {said}")
        if not answered.right:
            answer.append(f"  (truth: {answered.asked.question.answer})", style="dim")
        answer.stylize("green" if answered.right else "red", 0, 1)
        table.add_row(Text(prompt), answer)
    demo.console.print(table)
    page = demo.out / PAGE
    write_report(
        Report(
            title="Micro answers",
            lead="Pictures that it never saw, with its answers as they come, right or wrong.",
            stages=[StageScores(name="micro", scores=scores)],
            num_pictures=PAGE_QUESTIONS,
            show_scores=False,
        ),
        page,
    )
    demo.console.print(f"with the pictures: {page}", highlight=False, soft_wrap=True)
    return sum(len(score.answered) for score in scores)


def _report(demo: Demonstration, name: str, commands: str) -> Report:
    return Report(
        title="A lesson in boxes",
        lead=f"{name[0].upper()}{name[1:]} knew coloured shapes by name and place and had never "
        "seen a box. It was fine-tuned to say where they are, in coordinates, while a share of "
        "what it had learned before was rehearsed. Then it was reinforced: by pairs of its own "
        "right and wrong answers (MPO), and by answers that did better than others to the same "
        "question (GSPO). The first two rows are new; the others show what it kept.",
        stages=demo.stages,
        plots=course_plots(
            demo.course.curves(),
            demo.losses,
            curve_note="A small examination a point, with other held-out questions than in the "
            "table.",
            loss_note="Of boxes and rehearsal together, then of MPO; that of GSPO says little, "
            "and is left out.",
        ),
        facts=demo.facts,
        commands=commands,
        compare=True,
    )
