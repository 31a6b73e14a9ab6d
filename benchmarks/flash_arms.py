"""Is half of the visual tokens enough? The InternVL3.5 report's Table 17, and the whole curve.

A model is first brought to read the material (`flash_material`), all tiles full: the baseline.
Then, for each seed, ViCO: visual consistency, and the router. Held-out questions are asked with all
tiles full, with all compressed (before and after consistency), and with a part of them full that is
chosen by the router, at random, by the density of edges, or by the entropy of grey levels
(`flash_rules`). Every rule has its threshold set on tiles of the training part, once for each
share, so that a tile is routed by itself; the tokens it comes to are counted on the questions.

The material counts only if compressing always costs at least three points after consistency. Scores
do not depend on the machine. What is done is not done again.
Run: ``python benchmarks/flash_arms.py --out runs/flash_arms``. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flash_material as material
import torch
from experiment import finished, kept, quiet
from flash_curves import ALL_FULL, ALL_SMALL, BEFORE, SMALL_BEFORE, draw, summarise, table
from flash_rules import RULES, rule_of

from cascadevl.config import load_config
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.eval.suite import Asked, draw_row
from cascadevl.host_memory import keep_freed_memory
from cascadevl.model.flash import add_flash
from cascadevl.model.flash_start import start_as_mean
from cascadevl.model.loading import load
from cascadevl.model.routing import Thresholds, calibrated, compressed_tiles, tokens_of
from cascadevl.tasks.base import to_prompt
from cascadevl.train.config import TrainConfig
from cascadevl.train.optim import OptimConfig
from cascadevl.train.router import router
from cascadevl.train.router_config import RouterConfig
from cascadevl.train.sft import sft
from cascadevl.train.vico import ViCOConfig, heads_for, vico
from cascadevl.types import Example

SHARES = (0.1, 0.2, 1 / 3, 0.5, 0.7)
"""Shares of the tiles that stay full; a third is half of the visual tokens."""

SEED_OF_TILES = 77
"""Seed of the training scenes whose tiles set the thresholds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is done.

    Attributes:
        out: Where everything is kept.
        model: The model it starts from.
        vico: Visual consistency.
        router: The router.
        base_steps: Steps in which the model learns to read the material; 0 takes it as it is.
        questions: Of each family and seed.
        scenes: Of each family, whose tiles set the thresholds.
        answer_tokens: Longest answer.
    """

    out: Path
    model: str
    vico: ViCOConfig
    router: RouterConfig
    base_steps: int
    questions: int
    scenes: int
    answer_tokens: int


def main() -> None:
    """Run what is missing, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/flash_arms"))
    parser.add_argument("--model", default="micro")
    parser.add_argument("--vico", type=Path, default=Path("configs/vico_micro.yaml"))
    parser.add_argument("--router", type=Path, default=Path("configs/router_micro.yaml"))
    parser.add_argument("--base-steps", type=int, default=1200)
    parser.add_argument("--vico-steps", type=int, default=1200)
    parser.add_argument("--router-steps", type=int, default=None)
    parser.add_argument("--records", type=int, default=None, help="measured for the router")
    parser.add_argument("--questions", type=int, default=200, help="of each family and seed")
    parser.add_argument("--scenes", type=int, default=60, help="of each family, for thresholds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    routed = load_config(RouterConfig, files=[args.router])
    if args.router_steps is not None:
        routed = replace(routed, run=replace(routed.run, num_steps=args.router_steps))
    if args.records is not None:
        routed = replace(routed, router=replace(routed.router, records=args.records))
    consistent = load_config(ViCOConfig, files=[args.vico])
    plan = Plan(
        out=args.out,
        model=args.model,
        vico=replace(consistent, run=replace(consistent.run, num_steps=args.vico_steps)),
        router=routed,
        base_steps=args.base_steps,
        questions=args.questions,
        scenes=args.scenes,
        answer_tokens=128,
    )
    base = base_model(plan)
    results = [
        kept(args.out / f"arms-{seed}.json", lambda seed=seed: arms_of_seed(plan, base, seed))
        for seed in args.seeds
    ]
    summary = summarise(results)
    (args.out / "arms.md").write_text(table(summary), "utf-8")
    draw(summary, args.out / "arms.png")
    print(table(summary))
    print(json.dumps(summary))


def base_model(plan: Plan) -> str:
    """The model that reads the material with all tiles full, trained unless it is there."""
    if not plan.base_steps:
        return plan.model
    run = replace(
        plan.vico.run,
        num_steps=plan.base_steps,
        out=plan.out / "base",
        resume=True,
        seed=0,
    )
    config = TrainConfig(
        model=replace(plan.vico.model, path=plan.model),
        data=replace(plan.vico.data, meta=()),
        batch=replace(plan.vico.batch, averaging="square"),
        optim=replace(OptimConfig(), lr=8e-4, betas=(0.9, 0.95)),
        run=run,
    )
    if not (run.out / "model").exists():
        finished(sft(config, sources=material.sources(100), console=quiet()))
    return str(run.out / "model")


def trained(plan: Plan, base: str, seed: int) -> tuple[Path, Path]:
    """The models of a seed after visual consistency and with a trained router."""
    folder = plan.out / f"{seed}"
    consistent, routed = (folder / stage / "model" for stage in ("vico", "router"))
    if not consistent.exists():
        config = replace(
            plan.vico,
            model=replace(plan.vico.model, path=base),
            data=replace(plan.vico.data, meta=()),
            run=replace(plan.vico.run, out=folder / "vico", resume=True, seed=seed),
        )
        finished(vico(config, sources=material.sources(200 + seed), console=quiet()))
    if not routed.exists():
        router_config = replace(
            plan.router,
            model=replace(plan.router.model, path=str(consistent)),
            data=replace(plan.router.data, meta=()),
            router=replace(plan.router.router, reference=base),
            run=replace(plan.router.run, out=folder / "router", resume=True, seed=seed),
        )
        finished(router(router_config, sources=material.sources(300 + seed), console=quiet()))
    return consistent, routed


def arms_of_seed(plan: Plan, base: str, seed: int) -> dict[str, Any]:
    """Right answers and visual tokens of every question, arm by arm."""
    _, routed = trained(plan, base, seed)
    before, processor = load(base)
    add_flash(before, seed=0, num_heads=heads_for(before.config))
    start_as_mean(before)
    after, _ = load(routed)
    asked = [
        question
        for row in material.rows(plan.questions)
        for question in draw_row(row, split="test", seed=1000 + seed)
    ]
    examples = [processor.prompt(to_prompt(each.scene, each.question)) for each in asked]
    tiles = calibration_tiles(plan, processor)
    found: dict[str, Any] = {"rows": [each.row for each in asked], "arms": {}}
    for model, names in ((before, (BEFORE, SMALL_BEFORE)), (after, (ALL_FULL, ALL_SMALL))):
        engine = Engine(model, processor)
        for name in names:
            number = int(name.startswith("compressed"))
            sizes = (model.tokens_per_tile, model.config.compressed_tokens)
            counts = [(sizes[number],) * example.num_tiles for example in examples]
            found["arms"][name] = answered(engine, asked, examples, counts, plan.answer_tokens)
    engine = Engine(after, processor)
    for rule_name in RULES:
        rule = rule_of(rule_name, after, seed)
        scores = [score for example in tiles for score in rule(example)]
        chances = [torch.tensor(rule(example)) for example in examples]
        for share in SHARES:
            limits: Thresholds = calibrated(scores, share)
            counts = [tokens_of(after.config, compressed_tiles(each, limits)) for each in chances]
            found["arms"][f"{rule_name}, {share:.2f}"] = answered(
                engine, asked, examples, counts, plan.answer_tokens
            )
    return found


def calibration_tiles(plan: Plan, processor: CascadeVLProcessor) -> list[Example]:
    """Prompts of the training part, whose tiles set the thresholds of every rule."""
    return [
        processor.prompt(to_prompt(scene, scene.questions[0]))
        for family in material.FAMILIES
        for scene in (
            family.task.draw("train", SEED_OF_TILES, index) for index in range(plan.scenes)
        )
    ]


def answered(
    engine: Engine,
    asked: Sequence[Asked],
    examples: Sequence[Example],
    counts: Sequence[tuple[int, ...]],
    answer_tokens: int,
) -> dict[str, Any]:
    """Whether each answer is right with so many visual tokens a tile, and how many that were."""
    sampling = SamplingParams(temperature=0.0, max_tokens=answer_tokens)
    requests = [
        Request(prompt=replace(example, tokens_per_tile=each), sampling=sampling)
        for example, each in zip(examples, counts, strict=True)
    ]
    said = [completion.text for (completion,) in engine.generate(requests)]
    right = [each.question.check(text) for each, text in zip(asked, said, strict=True)]
    return {"right": right, "tokens": [sum(each) for each in counts]}


if __name__ == "__main__":
    main()
