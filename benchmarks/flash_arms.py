"""Is half of the visual tokens enough? The InternVL3.5 report's Table 17, and the whole curve.

A model is first brought to read the material (`flash_material`), all tiles full: the baseline.
Then, for each seed, ViCO: visual consistency, and the router, once with the report's labels and
once with differences of losses. Held-out questions are asked with all tiles full, with all
compressed (before and after consistency), and with a part of them full that is chosen by the
router, at random, or by the density of edges (`flash_rules`). Every rule has its threshold set on
tiles of the training part, once for each share, so that a tile is routed by itself; the tokens it
comes to are counted on the questions.

The material counts only if compressing always costs at least three points after consistency. All
arms answer the same questions, so they are compared in pairs. Scores do not depend on the machine.
What is done is not done again: models, losses and arms are kept one by one, and after any end the
same command goes on. Once the baseline is there, seeds may run side by side (``--seeds 1``); the
whole command then puts them together. ``core_hours.json`` of each folder says what it took.

Cost, measured: 0.4 core-hours for the baseline and 0.6 for each seed, one thread.
Run: ``python benchmarks/flash_arms.py --out runs/flash_arms --mixed 0 --threads 1``, which draws as
the report does. The last line is one
JSON document. ``--tiny`` proves in minutes that it works.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import flash_material as material
import torch
from experiment import CoreHours, begun_with, kept
from flash_curves import ALL_FULL, ALL_SMALL, BEFORE, SMALL_BEFORE, draw, summarise, tables
from flash_models import Recipe, base_model, routed_models
from flash_rules import ROUTERS, RULES, Rule, rule_of

from cascadevl.config import load_config
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import EngineConfig, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.eval.suite import Asked, draw_row, most_frequent
from cascadevl.host_memory import keep_freed_memory
from cascadevl.model.flash import add_flash
from cascadevl.model.flash_start import start_as_mean
from cascadevl.model.loading import find, load
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.routing import calibrated, compressed_tiles, tokens_of
from cascadevl.model.shipped import edition
from cascadevl.tasks.base import Question, to_prompt
from cascadevl.train.router_config import RouterConfig
from cascadevl.train.vico import ViCOConfig, heads_for
from cascadevl.types import Example

SHARES = (0.1, 0.2, 1 / 3, 0.5, 0.7)
"""Shares of the tiles that stay full; a third is half of the visual tokens."""

SEED_OF_TILES = 77
"""Seed of the training scenes whose tiles set the thresholds."""

SEED_OF_QUESTIONS = 1000
"""Each seed's questions are those of the scenes with the sum of this and the seed."""

ANSWER_TOKENS = 128
"""Longest answer."""

ENGINE = EngineConfig(cache_bytes=2**29, feature_bytes=2**29, max_step_tiles=64, prefix_cache=False)
"""Room for the patch features of all pictures of a seed, so that they are encoded once."""

TINY = {
    "base_steps": 2,
    "vico_steps": 2,
    "router_steps": 2,
    "records": 24,
    "questions": 2,
    "scenes": 2,
}
"""Sizes that prove that the program works, and nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Exam:
    """What every arm is asked.

    Attributes:
        rows: The family of each question.
        questions: The questions.
        examples: Their prompts, all tiles full.
        tiles: Prompts of the training part, whose tiles set the thresholds of every rule.
    """

    rows: list[str]
    questions: list[Question]
    examples: list[Example]
    tiles: list[Example]


def main() -> None:
    """Run what is missing, and write table and picture."""
    args = arguments()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    recipe = recipe_of(args)
    settings = {**asdict(recipe), "questions": args.questions, "scenes": args.scenes}
    begun_with(args.out / "settings.json", {k: v for k, v in settings.items() if k != "out"})
    hours = CoreHours(args.out / "core_hours.json")
    base = base_model(recipe, hours)
    print(f"baseline: {hours.words}", flush=True)
    results = []
    for seed in args.seeds:
        hours = CoreHours(args.out / f"{seed}" / "core_hours.json")
        ask = partial(arms_of_seed, recipe, base, seed, args.questions, args.scenes, hours)
        results.append(kept(args.out / f"arms-{seed}.json", ask))
        print(f"seed {seed}: {hours.words}", flush=True)
    number = edition(find(args.model))
    summary = {
        "model": args.model,
        "edition": number,
        "seeds": args.seeds,
        "guessing": guessing(args.questions, args.seeds),
        **summarise(results),
    }
    (args.out / "arms.md").write_text(tables(summary), "utf-8")
    draw(summary, args.out / "arms.png")
    print(tables(summary))
    print(json.dumps(summary))


def arguments() -> argparse.Namespace:
    """What the program is told."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/flash_arms"))
    parser.add_argument("--model", default="micro")
    parser.add_argument("--vico", type=Path, default=Path("configs/vico_micro.yaml"))
    parser.add_argument("--router", type=Path, default=Path("configs/router_micro.yaml"))
    parser.add_argument("--mixed", type=float, help="instead of the configuration's vico.mixed")
    parser.add_argument("--base-steps", type=int, default=1000)
    parser.add_argument("--vico-steps", type=int, default=600)
    parser.add_argument("--router-steps", type=int, default=300)
    parser.add_argument("--records", type=int, default=4000, help="measured for the router")
    parser.add_argument("--questions", type=int, default=250, help="of each family and seed")
    parser.add_argument("--scenes", type=int, default=60, help="of each family, for thresholds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="prove that it works, in minutes")
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY)
    return args


def recipe_of(args: argparse.Namespace) -> Recipe:
    """How the models come about, by the arguments and the configurations they name."""
    consistent = load_config(ViCOConfig, files=[args.vico])
    if args.mixed is not None:
        consistent = replace(consistent, vico=replace(consistent.vico, mixed=args.mixed))
    routed = load_config(RouterConfig, files=[args.router])
    return Recipe(
        out=args.out,
        model=args.model,
        vico=replace(consistent, run=replace(consistent.run, num_steps=args.vico_steps)),
        router=replace(
            routed,
            router=replace(routed.router, records=args.records),
            run=replace(routed.run, num_steps=args.router_steps),
        ),
        base_steps=args.base_steps,
    )


def arms_of_seed(
    recipe: Recipe, base: str, seed: int, questions: int, scenes: int, hours: CoreHours
) -> dict[str, Any]:
    """Right answers and visual tokens of every question, arm by arm.

    Args:
        recipe: How the models come about.
        base: The model before visual consistency.
        seed: Of the models and the questions.
        questions: Of each family.
        scenes: Of each family, whose tiles set the thresholds.
        hours: Where the time is counted.
    """
    before, processor = load(base)
    add_flash(before, seed=0, num_heads=heads_for(before.config))
    start_as_mean(before)
    folder = recipe.out / f"{seed}" / "arms"
    with hours.counted("answers") as note:
        exam = drawn(processor, questions, scenes, seed)
        arms = Arms(folder, exam, Engine(before, processor, ENGINE), note)
        found = {BEFORE: arms.all_alike(BEFORE, 0), SMALL_BEFORE: arms.all_alike(SMALL_BEFORE, 1)}
    models = {
        name: load(path)[0] for name, path in routed_models(recipe, base, seed, hours).items()
    }
    after = models[next(iter(ROUTERS))]
    with hours.counted("answers") as note:
        arms = Arms(folder, exam, Engine(after, processor, ENGINE), note)
        found |= {ALL_FULL: arms.all_alike(ALL_FULL, 0), ALL_SMALL: arms.all_alike(ALL_SMALL, 1)}
        for name in RULES:
            found |= arms.routed(name, rule_of(name, models, seed))
    return {"rows": exam.rows, "arms": found}


def asked_of_seed(questions: int, seed: int) -> list[Asked]:
    """The held-out questions of a seed, family after family."""
    return [
        each
        for row in material.rows(questions)
        for each in draw_row(row, split="test", seed=SEED_OF_QUESTIONS + seed)
    ]


def guessing(questions: int, seeds: Sequence[int]) -> dict[str, float]:
    """Percent of right answers to each family by always giving its most frequent answer."""
    asked = [each for seed in seeds for each in asked_of_seed(questions, seed)]
    return {
        row.name: 100 * most_frequent([each for each in asked if each.row == row.name]).share
        for row in material.rows(questions)
    }


def drawn(processor: CascadeVLProcessor, questions: int, scenes: int, seed: int) -> Exam:
    """The questions of a seed, and the tiles that set thresholds, the same for all seeds."""
    asked = [
        (each.row, each.question, processor.prompt(to_prompt(each.scene, each.question)))
        for each in asked_of_seed(questions, seed)
    ]
    training = (
        family.task.draw("train", SEED_OF_TILES, index)
        for family in material.FAMILIES
        for index in range(scenes)
    )
    return Exam(
        rows=[row for row, _, _ in asked],
        questions=[question for _, question, _ in asked],
        examples=[example for _, _, example in asked],
        tiles=[processor.prompt(to_prompt(scene, scene.questions[0])) for scene in training],
    )


class Arms:
    """Asks one model; what an arm answered is kept in a file of its own."""

    def __init__(self, folder: Path, exam: Exam, engine: Engine, note: Callable[..., None]) -> None:
        """Bind what the arms share.

        Args:
            folder: Of the files.
            exam: What is asked.
            engine: Answers.
            note: Called after each arm.
        """
        self._folder, self._exam, self._engine, self._note = folder, exam, engine, note

    def all_alike(self, name: str, size: int) -> dict[str, Any]:
        """An arm in which all tiles are full (0) or compressed (1)."""
        model = self._model
        tokens = (model.tokens_per_tile, model.config.compressed_tokens)[size]
        return self._kept(
            name, lambda: [(tokens,) * example.num_tiles for example in self._exam.examples]
        )

    def routed(self, name: str, rule: Rule) -> dict[str, dict[str, Any]]:
        """The arms of a rule, one for each share of tiles that stay full."""

        @cache
        def calibration() -> list[float]:
            return [score for example in self._exam.tiles for score in rule(example)]

        @cache
        def scores() -> list[torch.Tensor]:
            return [torch.tensor(rule(example)) for example in self._exam.examples]

        def counts(share: float) -> list[tuple[int, ...]]:
            limits = calibrated(calibration(), share)
            config = self._model.config
            return [tokens_of(config, compressed_tiles(each, limits)) for each in scores()]

        names = {share: f"{name}, {share:.2f}" for share in SHARES}
        return {arm: self._kept(arm, partial(counts, share)) for share, arm in names.items()}

    @property
    def _model(self) -> CascadeVLForConditionalGeneration:
        return self._engine.model

    def _kept(self, name: str, counts: Callable[[], list[tuple[int, ...]]]) -> dict[str, Any]:
        file = re.sub(r"[^a-z0-9]+", "-", name) + ".json"
        found = kept(self._folder / file, lambda: self._answered(counts()))
        self._note()
        return found

    def _answered(self, counts: Sequence[tuple[int, ...]]) -> dict[str, Any]:
        """Whether each answer is right with so many visual tokens a tile, and their number."""
        sampling = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS)
        requests = [
            Request(prompt=replace(example, tokens_per_tile=each), sampling=sampling)
            for example, each in zip(self._exam.examples, counts, strict=True)
        ]
        said = [completion.text for (completion,) in self._engine.generate(requests)]
        right = [
            question.check(text) for question, text in zip(self._exam.questions, said, strict=True)
        ]
        return {"right": right, "tokens": [sum(each) for each in counts]}


if __name__ == "__main__":
    main()
