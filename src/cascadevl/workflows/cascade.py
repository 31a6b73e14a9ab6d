"""Cascade RL from end to end: one command, one configuration, and every stage only once.

InternVL3.5 report: offline reinforcement (MPO) brings a fine-tuned model quickly to where its
answers are worth learning from; online reinforcement (GSPO) takes it from there. What the
fine-tuned model answered to the questions once serves both: as pairs, and to choose questions.

Each stage has a folder. It is done when ``done.json`` stands in it, which says what it was made
from; a stage that is done is not done again, and one that was interrupted in any way goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cascadevl.data.journal import alone
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.conversation import answer
from cascadevl.errors import ConfigError
from cascadevl.eval.runner import Score, run_suite
from cascadevl.eval.suite import SuiteRow
from cascadevl.model.loading import load
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.tasks.naming import task_named
from cascadevl.train.config import FREE_KEYS
from cascadevl.types import Message
from cascadevl.workflows.cascade_config import CascadeConfig, ExamSection, StageName
from cascadevl.workflows.cascade_report import (
    CascadeSummary,
    Examined,
    ExamRow,
    StageLine,
    terminal_table,
    write_summary,
)
from cascadevl.workflows.cascade_stages import Done, Place, run_stage
from cascadevl.workflows.course import Course

DONE, EXAM, COURSE = "done.json", "exam.json", "course.json"
START = "start"
"""Folder of the examination before the first stage."""

FILES = ("store", "pairs", "questions")
"""Parts of a place that are paths."""

SECTIONS: dict[StageName, tuple[str, ...]] = {
    "pretrain": ("pretrain",),
    "sft": ("sft",),
    "rollouts": ("rollouts", "problems"),
    "pairs": ("pairs",),
    "mpo": ("mpo",),
    "filter": ("filter",),
    "gspo": ("gspo", "problems"),
    "vico": ("vico",),
    "router": ("router",),
}
"""What of the configuration a stage depends on."""


def cascade(config: CascadeConfig, *, console: Console | None = None) -> CascadeSummary:
    """Go through the stages, or on with them.

    Args:
        config: The cascade.
        console: Where progress is shown; standard error if None.

    Raises:
        ConfigError: If a stage was done with other settings, or another process is at work here.
        CascadeVLError: Whatever a stage refuses; those before it are kept.
        TrainingError: If it was asked to stop; the same call goes on.
    """
    console = console or Console(stderr=True)
    config.out.mkdir(parents=True, exist_ok=True)
    with alone(config.out / COURSE):
        course = Course(config.out / COURSE)
        place, lines = Place(model=config.model), list[StageLine]()
        if place.model is not None:
            exam = _examined(config.exam, place.model, config.out / START, console)
            lines.append(_line(START, exam))
        for stage in config.ordered:
            done = _finished(config, stage, place)
            if done is None:
                console.rule(stage)
                done = _run(config, stage, place, course, console)
            changed = done.place.model != place.model
            place = done.place
            exam = Examined()
            if changed and place.model is not None:
                exam = _examined(config.exam, place.model, config.out / stage, console)
            seconds = course.seconds.get(stage, 0.0)
            lines.append(_line(stage, exam, seconds=seconds, flops=done.flops, facts=done.facts))
            table = write_summary(lines, config.out)
        console.print(terminal_table(lines))
        assert place.model is not None
        return CascadeSummary(lines=lines, model=place.model, table=table)


def _line(
    stage: str,
    exam: Examined,
    *,
    seconds: float = 0.0,
    flops: float = 0.0,
    facts: Mapping[str, float] | None = None,
) -> StageLine:
    """A line of the summary."""
    return StageLine(
        stage=stage,
        seconds=seconds,
        flops=flops,
        facts=facts or {},
        exam=exam.rows,
        visual_share=exam.visual_share,
    )


def _run(
    config: CascadeConfig, stage: StageName, place: Place, course: Course, console: Console
) -> Done:
    """Do a stage and write down that it is done."""
    course.start(stage)
    try:
        done = run_stage(config, stage, place, console)
    finally:
        course.stop(stage)
    values = {
        "settings": _settings(config, stage, place),
        "place": _plain(asdict(done.place)),
        "facts": dict(done.facts),
        "flops": done.flops,
    }
    _write(config.out / stage / DONE, values)
    return done


def _finished(config: CascadeConfig, stage: StageName, place: Place) -> Done | None:
    """What a stage left, if it is done.

    Raises:
        ConfigError: If it was done with other settings.
    """
    path = config.out / stage / DONE
    if not path.is_file():
        return None
    kept = json.loads(path.read_text("utf-8"))
    if differing := _differing(kept["settings"], _settings(config, stage, place)):
        key, before, now = differing
        raise ConfigError(
            f"{stage} was done here with {key} = {before!r}, and now it is {now!r}; take another "
            f"folder with out=DIR, or delete {path.parent} and the folders of later stages"
        )
    left = kept["place"]
    files = {name: None if left[name] is None else Path(left[name]) for name in FILES}
    left_place = Place(model=left["model"], reference=left.get("reference"), **files)
    return Done(place=left_place, facts=kept["facts"], flops=kept["flops"])


def _settings(config: CascadeConfig, stage: StageName, place: Place) -> dict[str, Any]:
    """What a stage depends on, as flat JSON values: its sections, and what it begins with."""
    sections = {name: getattr(config, name) for name in SECTIONS[stage]}
    flat = _flat(_plain({name: asdict(section) for name, section in sections.items()}))
    free = {f"{stage}.{key}" for key in FREE_KEYS}
    begins = {f"begins with {key}": value for key, value in _plain(asdict(place)).items()}
    return {key: value for key, value in flat.items() if key not in free} | begins


def _plain(values: Any) -> Any:
    return json.loads(json.dumps(values, default=str))


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            return key, before.get(key), now.get(key)
    return None


def _examined(exam: ExamSection, model: str, folder: Path, console: Console) -> Examined:
    """Scores of a model; those of an earlier attempt, if the questions were the same."""
    if not exam.tasks:
        return Examined()
    path, settings = folder / EXAM, _plain({**asdict(exam), "model": model})
    if path.is_file():
        kept = json.loads(path.read_text("utf-8"))
        if kept["settings"] == settings and "right" in kept:
            seen = [ExamRow(**row) for row in kept["rows"]]
            return Examined(rows=seen, visual_share=kept.get("visual_share", 1.0))
    with console.status(f"asking {exam.questions} questions of each of {len(exam.tasks)} kinds"):
        scores, visual_share = _asked(exam, model)
    rows = [ExamRow.of(score) for score in scores]
    found = Examined(rows=rows, visual_share=visual_share)
    right = {score.row: [one.right for one in score.answered] for score in scores}
    _write(path, {"settings": settings, **asdict(found), "right": right})
    line = " · ".join(f"{row.name} {100 * row.share:.1f}" for row in rows)
    if found.visual_share < 1:
        line += f" · with {found.visual_share:.1%} of the visual tokens"
    console.print(f"% right: {line}", highlight=False)
    return found


def right_answers(config: CascadeConfig) -> dict[str, list[bool]]:
    """Which held-out questions of each row the last model of a finished cascade answers rightly.

    Args:
        config: The cascade, with an examination.
    """
    folders = [config.out / name for name in (START, *config.ordered)]
    (*_, last) = [folder for folder in folders if (folder / EXAM).is_file()]
    right: dict[str, list[bool]] = json.loads((last / EXAM).read_text("utf-8"))["right"]
    return right


def _asked(exam: ExamSection, model: str) -> tuple[list[Score], float]:
    """All scores of a model, and the visual tokens of its pictures as a share of full ones."""
    responder = _Counting(*load(model), max_new_tokens=exam.answer_tokens)
    scores: list[Score] = []
    for responder.temperature in exam.temperatures:
        drawn = f", drawn at {responder.temperature:g}" if responder.temperature else ""
        suite = [
            SuiteRow(
                name=f"{name}{drawn}",
                task=task_named(name, px=exam.px),
                num_questions=exam.questions,
            )
            for name in exam.tasks
        ]
        scores += run_suite(responder, suite, seed=exam.seed)
    return scores, responder.visual_share


@dataclass(slots=True)
class _Counting:
    """A model that answers, and counts the visual tokens that its pictures take.

    Attributes:
        model: The model.
        processor: Its processor.
        max_new_tokens: Longest answer.
        temperature: Answers are drawn at; 0 for greedy ones.
        visual_share: Of the latest answers: visual tokens as a share of those of full tiles.
    """

    model: CascadeVLForConditionalGeneration
    processor: CascadeVLProcessor
    max_new_tokens: int
    temperature: float = 0.0
    visual_share: float = 1.0

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """Answer all conversations."""
        answers = answer(
            self.model,
            self.processor,
            conversations,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=0,
        )
        tokens = [number for each in answers for number in each.tokens_per_tile]
        full = len(tokens) * self.model.tokens_per_tile
        self.visual_share = sum(tokens) / full if full else 1.0
        return [each.text for each in answers]


def _write(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
