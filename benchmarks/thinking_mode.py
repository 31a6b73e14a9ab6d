"""Is the thinking mode chosen by the system prompt, and obeyed? And which mode is right more often?

A nano model that reads and calculates without steps (pre-training, short answers) is fine-tuned on
thinking data made by `cascadevl.workflows.thinking_data` from the tasks' worked steps: the same
questions with the released Thinking system prompt and worked steps, and without it and answered
directly. Then held-out questions are asked in both ways: how many answers have the form of their
mode, and how many are right. Questions whose kinds never came with thinking are asked too.

The released prompt is used word for word; the tokenizer has seen it, so that it takes about 115
tokens instead of 400. ``--system TEXT`` puts a shorter one in its place.

Scores do not depend on the machine. What is done already is not done again.
Run: ``python benchmarks/thinking_mode.py --out runs/thinking``. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from cascadevl.data.mixture import WeightedSource
from cascadevl.data.prompts import THINKING_PROMPT
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.suite import Asked, SuiteRow, draw_row
from cascadevl.model.loading import load
from cascadevl.scoring.metrics import accuracy
from cascadevl.scoring.reasoning import Solution, take_apart
from cascadevl.tasks.base import Question, Task, TaskSource, to_prompt
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.problems import TaskProblems
from cascadevl.tasks.text import Text
from cascadevl.train.pretrain import pretrain
from cascadevl.train.run import TrainResult
from cascadevl.train.sft import sft
from cascadevl.types import Message
from cascadevl.workflows import nano
from cascadevl.workflows.thinking_config import ThinkingConfig
from cascadevl.workflows.thinking_data import make_thinking_data

EXAM_SEED = 900
ANSWER_TOKENS = 96
SCENES = 1_000_000

WRITTEN = Handwriting(difficulty="add_digits", num_questions=3)
SUMS = Text(difficulty="easy", num_questions=11)
"""Two handwritten digits to add; calculations up to 20 and words up to five letters."""

DIRECT_RATIO = 1.5
"""Direct answers for each thinking record: so every question of the text task gets one, also those
that never come with thinking."""


def is_worked(question: Question) -> bool:
    """Whether a question comes with worked steps: these were trained in both modes."""
    return question.reasoning is not None


def is_bare(question: Question) -> bool:
    """Whether it comes without: its kind was never trained with thinking."""
    return question.reasoning is None


ROWS: dict[str, tuple[Task, Callable[[Question], bool]]] = {
    "two handwritten digits, added": (WRITTEN, is_worked),
    "calculations and words": (SUMS, is_worked),
    "kinds never seen with thinking": (SUMS, is_bare),
}


def main() -> None:
    """Train what is missing, ask, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/thinking"))
    parser.add_argument("--base-steps", type=int, default=600, help="of pre-training, done once")
    parser.add_argument("--steps", type=int, default=600, help="of fine-tuning, for each seed")
    parser.add_argument("--scenes", type=int, default=4000, help="of each task, as thinking data")
    parser.add_argument("--rows", type=int, default=16, help="samples a step")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=200, help="of each row, mode and seed")
    parser.add_argument("--system", default=THINKING_PROMPT, help="thinking system prompt")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = make_base(args.out / "base", args.base_steps, args.system)
    meta = make_data(args.out / "data", args.scenes, args.system)
    results = []
    before = once(
        args.out / "before.json",
        lambda: examine(base, args.seeds[0], args.questions, args.system),
    )
    for seed in args.seeds:

        def one_seed(seed: int = seed) -> dict[str, Any]:
            path = fine_tune(base, meta, args.out / f"seed-{seed}", seed, args.steps, args.rows)
            return examine(path, seed, args.questions, args.system)

        results.append(once(args.out / f"seed-{seed}.json", one_seed))
        print(f"seed {seed} is done", flush=True)
    scores = summarise(results, before)
    print(table(scores))
    (args.out / "thinking.md").write_text(table(scores), "utf-8")
    settings = {key: str(value) for key, value in vars(args).items() if key != "out"}
    settings["system"] = "released" if args.system == THINKING_PROMPT else args.system
    prompt = results[0]["system_tokens"]
    print(json.dumps({"settings": settings, "system_tokens": prompt, "scores": scores}))


def once(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result that is made if its file is not there."""
    if not file.exists():
        file.write_text(json.dumps(make()), "utf-8")
    result: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return result


def tokenizer(system: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the words of both tasks and of the system prompt."""
    scenes = chain.from_iterable(
        (task.draw("train", nano.SEED, index) for index in range(300)) for task in (WRITTEN, SUMS)
    )
    texts = [
        f"{question.prompt}\n{question.response('think')}"
        for scene in scenes
        for question in scene.questions
    ]
    # A word counts once it is frequent: the prompt stands as often as each question.
    return build_tokenizer([*texts, *[system] * 400], nano.VOCAB_SIZE)


def make_base(out: Path, num_steps: int, system: str) -> Path:
    """A model that reads digits and answers in short; trained once, the same for every seed."""
    if (done := out / "model").exists():
        return done
    shares: tuple[tuple[str, Task, float], ...] = (
        ("one digit", Handwriting(difficulty="one", num_questions=2), 0.3),
        ("two rows", WRITTEN, 0.4),
        ("text", replace(SUMS, num_questions=3), 0.3),
    )
    sources = [
        WeightedSource(
            source=TaskSource(
                task=task, length=SCENES, seed=7, stage="pretrain", style="short", label=label
            ),
            weight=weight,
        )
        for label, task, weight in shares
    ]
    config = nano.stage_config("pretrain", out, num_steps=num_steps, model=None)
    config = replace(config, run=replace(config.run, eval_interval=0))
    quiet = Console(quiet=True)
    return finished(pretrain(config, sources=sources, tokenizer=tokenizer(system), console=quiet))


def make_data(out: Path, num_scenes: int, system: str) -> Path:
    """Both modes of every question with worked steps, and direct answers of others, as files."""
    tasks = [WRITTEN, replace(SUMS, num_questions=3)]
    problems = TaskProblems(tasks=tasks, num_scenes=num_scenes, seed=nano.SEED, worked_only=False)
    config = ThinkingConfig(out=out, resume=True, system=system, direct_ratio=DIRECT_RATIO)
    report = make_thinking_data(problems, config)
    if report.meta is None:
        raise SystemExit("no thinking data were made; ask for more --scenes")
    return report.meta


def fine_tune(base: Path, meta: Path, out: Path, seed: int, num_steps: int, rows: int) -> Path:
    """The ordinary SFT recipe on the files."""
    config = nano.stage_config("sft", out, num_steps=num_steps, model=base)
    config = replace(
        config,
        data=replace(config.data, meta=(meta,)),
        batch=replace(config.batch, row_samples=rows),
        run=replace(config.run, seed=100 + seed, eval_interval=0),
    )
    return finished(sft(config, console=Console(quiet=True)))


def finished(result: TrainResult) -> Path:
    """The model of a run; the program ends where the run was asked to stop."""
    if result.model_path is None:
        raise SystemExit("asked to stop; the same command goes on from here")
    return result.model_path


def examine(path: Path, seed: int, num_questions: int, system: str) -> dict[str, Any]:
    """Of each row and mode, whether each answer is right, and in which form it is."""
    model, processor = load(str(path), dtype=torch.bfloat16)
    responder = ModelResponder(model=model, processor=processor, max_new_tokens=ANSWER_TOKENS)
    rows: dict[str, Any] = {}
    for name, (task, keep) in ROWS.items():
        row = SuiteRow(name=name, task=task, num_questions=num_questions, keep=keep)
        asked = draw_row(row, split="test", seed=EXAM_SEED + seed)
        rows[name] = {
            "think": ask(responder, asked, (Message.of("system", system),)),
            "direct": ask(responder, asked, ()),
        }
    length = len(processor.tokenizer(system).input_ids)
    return {"rows": rows, "system_tokens": length}


def ask(
    responder: ModelResponder, asked: Sequence[Asked], begin: tuple[Message, ...]
) -> dict[str, list[bool]]:
    """Ask all questions in one mode.

    ``think`` means exactly one closed block of thinking with an answer after it; ``direct``, no
    trace of one.
    """
    texts = responder([(*begin, *to_prompt(each.scene, each.question)) for each in asked])
    return {
        "right": [each.question.check(text) for each, text in zip(asked, texts, strict=True)],
        "think": [isinstance(take_apart(text), Solution) for text in texts],
        "direct": ["think>" not in text for text in texts],
    }


def summarise(results: Sequence[dict[str, Any]], before: dict[str, Any]) -> list[dict[str, Any]]:
    """Shares of all seeds together with Wilson intervals, of each seed, and of the base model."""
    scores = []
    for name in ROWS:
        for mode in ("think", "direct"):
            for what in ("obeyed", "right"):
                key = mode if what == "obeyed" else "right"
                each = [result["rows"][name][mode][key] for result in results]
                pooled = accuracy([value for values in each for value in values])
                base = before["rows"][name][mode][key]
                scores.append(
                    {
                        "row": name,
                        "mode": mode,
                        "what": what,
                        "percent": 100 * pooled.value,
                        "low": 100 * pooled.low,
                        "high": 100 * pooled.high,
                        "seeds": [100 * sum(values) / len(values) for values in each],
                        "num": pooled.num,
                        "before": 100 * sum(base) / len(base),
                    }
                )
    return scores


def table(scores: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, one line a row of questions and mode."""
    lines = ["| questions | system prompt | in its form, % | right, % |", "|---|---|---|---|"]
    cells = {(score["row"], score["mode"], score["what"]): score for score in scores}
    for row, mode in dict.fromkeys((score["row"], score["mode"]) for score in scores):
        texts = []
        for what in ("obeyed", "right"):
            score = cells[row, mode, what]
            interval = f"{score['low']:.0f}-{score['high']:.0f}"
            texts.append(f"{score['percent']:.1f} ({interval}), before {score['before']:.1f}")
        prompt = "Thinking" if mode == "think" else "none"
        lines.append(f"| {row} | {prompt} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
