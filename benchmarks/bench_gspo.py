"""Answers a second of reinforcement learning: ours against TRL's GRPOTrainer on the same questions.

The same checkpoint (micro, which comes with the package), the same prompts token by token, the
same tiles, one machine. A round of either side is a rollout batch: a group of answers to each
question is drawn, judged, and learned from in a few updates (GSPO: ratios of sequences, no
reference model).
TRL runs in its own environment (``--trl-python``), as a process that does a round when it is told
to and sleeps otherwise: rounds of both sides take turns. Rewards are drawn at random, so that every
group has something to learn and both sides compute the same: ours would leave out groups with equal
rewards, TRL does not.

First the losses are shown to be equal, in float32, on the same answers with the same advantages and
old log-probabilities. Ours trains bfloat16 weights with float32 masters, TRL float32 weights under
bfloat16 autocast, the same bytes of state. The last line is one JSON document, with the parts of
our time.
Run: ``python benchmarks/bench_gspo.py --trl-python VENV/bin/python --threads 2``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from bench_train_step import quartiles
from experiment import Given, quiet
from safetensors.torch import save_file
from torch import Tensor
from trl_peer import LR, Trl

import cascadevl
from cascadevl.data.collate import num_tokens
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.packed_weights import pack
from cascadevl.model.loading import save
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.scoring.rewards import Response, RewardConfig
from cascadevl.sequence import expand
from cascadevl.tasks.naming import task_named
from cascadevl.tasks.problems import TaskProblems
from cascadevl.train.answer_batch import AnswerBatch, lay_out, scored
from cascadevl.train.config import ModelConfig
from cascadevl.train.gspo import PARTS, Cycle, policy_objective
from cascadevl.train.gspo_config import GSPOConfig, PolicyConfig, RolloutConfig
from cascadevl.train.log import RunLog
from cascadevl.train.loop import RunConfig, TrainState
from cascadevl.train.optim import OptimConfig, Optimiser, set_precision
from cascadevl.train.questions import Asked, Asker, QuestionStream
from cascadevl.train.rollouts import Sampler, compared, judge
from cascadevl.train.sources import collate_config, example_builder
from cascadevl.train.start import make_trainable

CLIP = 0.2
CHANCE = np.random.default_rng(0)


def chance(_: Response) -> float:
    """A reward that is never the same for a whole group."""
    return float(CHANCE.random())


def config_of(args: argparse.Namespace) -> GSPOConfig:
    """The settings of both sides."""
    return GSPOConfig(
        model=ModelConfig(path="micro", precision="bfloat16"),
        optim=OptimConfig(lr=LR, schedule="constant", warmup_ratio=0.0),
        rollout=RolloutConfig(
            prompts=args.prompts,
            group=args.group,
            max_prompt_tokens=1024,
            max_answer_tokens=args.max_answer_tokens,
            precision=args.precision,
        ),
        rewards=RewardConfig(weights={"chance": 1.0}, overlong="keep"),
        policy=PolicyConfig(updates=args.updates, clip_low=CLIP, clip_high=CLIP),
        run=RunConfig(num_steps=args.updates * 10**6),
    )


def draw_questions(
    config: GSPOConfig, processor: CascadeVLProcessor, args: argparse.Namespace
) -> list[Asked]:
    """The questions of every round, each as the example that both sides are given."""
    problems = TaskProblems(
        tasks=[task_named(name) for name in args.tasks], num_scenes=10_000, worked_only=False
    )
    builder = example_builder(config.data, processor, 0)
    stream = QuestionStream(problems, Asker(builder, config), num_prompts=args.prompts, seed=0)
    return next(stream)


def write_prompts(asked: Sequence[Asked], processor: CascadeVLProcessor, path: Path) -> None:
    """The prompts as TRL's side reads them, images expanded."""
    tensors: dict[str, Tensor] = {}
    for number, each in enumerate(asked):
        prompt = each.prompt
        whole = expand(
            prompt.input_ids,
            prompt.trained,
            prompt.segments,
            prompt.parents,
            image_token_id=processor.image_token_id,
            tokens_per_image=[n * processor.tokens_per_tile for n in prompt.tiles_per_image],
            increments=(1.0,) * len(prompt.tiles_per_image),
        )
        tensors[f"ids.{number}"] = torch.from_numpy(whole.input_ids)
        tensors[f"tiles.{number}"] = torch.from_numpy(prompt.tiles)
    save_file(tensors, path)


class Ours:
    """Our side: the two halves of the recipe's rollout batch."""

    def __init__(self, config: GSPOConfig, asked: Sequence[Asked]) -> None:
        """Open the model and its engine."""
        self.config, self.asked = config, asked
        model, processor = cascadevl.load("micro", dtype=torch.bfloat16)
        set_precision(model, "bfloat16")
        packed = None if config.rollout.packed is None else pack(model, config.rollout.packed)
        accelerator = Accelerator(cpu=True)
        make_trainable(model, config.model, accelerator)
        state: TrainState[Any] = TrainState(
            model=model,
            optimiser=Optimiser(model.named_parameters(), config.optim),
            stream=Given(None),
            accelerator=accelerator,
        )
        sampler = Sampler(model, packed, processor, config.rollout)
        collate = collate_config(config.batch, processor, model.config)
        self.cycle = Cycle(config, state, model, sampler, {"chance": chance}, collate)
        self.log = RunLog(None, title="", num_steps=1, console=quiet())

    def round(self, threads: int) -> tuple[float, dict[str, float]]:
        """Seconds of a rollout batch, and what became of it."""
        torch.set_num_threads(threads)
        start = time.perf_counter()
        batch = self.cycle.roll_out(self.asked, threading.Event())
        assert batch is not None
        self.cycle.learn(batch, self.log, None)
        return time.perf_counter() - start, dict(self.cycle.state.metrics)


def given_answers(config: GSPOConfig, asked: Sequence[Asked]) -> tuple[Any, list[AnswerBatch]]:
    """Answers of the float32 model to a few questions, laid out, with old log-probabilities."""
    model, processor = cascadevl.load("micro", dtype=torch.float32)
    model.eval()
    sampler = Sampler(model, None, processor, config.rollout)
    drawn = sampler.draw(asked, seed=0, step=0)
    assert drawn is not None
    more = {"max_tokens": config.rollout.max_answer_tokens, "weight_version": ""}
    verifiers = {"chance": chance}
    rollouts = [
        judge(each, answers, verifiers, config.rewards, **more)
        for each, answers in zip(asked, drawn, strict=True)
    ]
    groups = compared(asked, rollouts, drawn, config.policy, config.rewards)
    collate = collate_config(config.batch, processor, model.config)
    device = torch.device("cpu")
    plans = lay_out(groups, config.batch, collate)
    done = scored(model, plans, collate, temperature=1.0, device=device)
    return (model, groups), [plan.batch(collate) for plan in done.plans]


def prove_equal(
    trl: Trl, config: GSPOConfig, asked: Sequence[Asked], count: int
) -> dict[str, float]:
    """The float32 loss of some answers; asserts that TRL's is the same.

    Old log-probabilities are set a little off the model's own, so that ratios are not 1.
    """
    (model, groups), batches = given_answers(config, asked[:count])
    assert len(batches) == 1, "one batch holds the few answers"
    batch = batches[0]
    generator = torch.Generator().manual_seed(0)
    off = 0.05 * torch.randn(batch.old_logprobs.shape, generator=generator)
    moved = AnswerBatch(
        rows=batch.rows,
        answer=batch.answer,
        advantages=batch.advantages,
        old_logprobs=batch.old_logprobs + off,
        engine_logprobs=batch.engine_logprobs,
    )
    objective = policy_objective(config, len(batch.advantages))
    with torch.no_grad():
        ours = float(objective.loss(model, moved, 1.0).loss)
    ends = torch.bincount(batch.answer).tolist()
    old = iter(moved.old_logprobs.split(ends))
    answers = [
        {
            "prompt": place,
            "ids": list(answer.token_ids),
            "advantage": advantage,
            "old": next(old).tolist(),
        }
        for place, group in enumerate(groups)
        for answer, advantage in zip(group.rollout.answers, group.advantages, strict=True)
    ]
    theirs = trl.ask(do="loss", answers=answers, **settings_of(config))["loss"]
    assert abs(theirs - ours) < 1e-4 * max(1.0, abs(ours)), (ours, theirs)
    return {"ours": ours, "trl": theirs}


def settings_of(config: GSPOConfig) -> dict[str, Any]:
    """What TRL is told of the run."""
    return {
        "prompts": config.rollout.prompts,
        "group": config.rollout.group,
        "updates": config.policy.updates,
        "max_answer_tokens": config.rollout.max_answer_tokens,
        "clip": CLIP,
        "lr": LR,
    }


def compare(trl: Trl, config: GSPOConfig, asked: Sequence[Asked], args: Any) -> dict[str, Any]:
    """Rounds of both sides in turn."""
    ours = Ours(config, asked)
    peer = {"batch": args.peer_batch, "threads": args.peer_threads, "attention": "sdpa"}
    trl.ask(do="train", **settings_of(config), **peer)
    ours.round(args.threads)
    trl.ask(do="round")
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    tokens: dict[str, list[float]] = {"ours": [], "trl": []}
    parts: list[dict[str, float]] = []
    for _ in range(args.repeats):
        spent, metrics = ours.round(args.threads)
        seconds["ours"].append(spent)
        tokens["ours"].append(metrics["length_tokens"])
        parts.append({part: metrics[f"{part}_s"] for part in PARTS})
        answer = trl.ask(do="round")
        seconds["trl"].append(answer["seconds"])
        tokens["trl"].append(answer["length_tokens"])
    trl.ask(do="close")
    ratios = [theirs / mine for mine, theirs in zip(*seconds.values(), strict=True)]
    low, median, high = quartiles(ratios)
    answers = config.rollout.prompts * config.rollout.group
    speed = {name: answers / statistics.median(values) for name, values in seconds.items()}
    means = {name: statistics.mean(values) for name, values in tokens.items()}
    split = {part: statistics.median(each[part] for each in parts) for part in PARTS}
    print(
        f"{median:.2f}x TRL (quartiles {low:.2f}-{high:.2f}, {args.repeats} rounds): "
        f"{speed['ours']:.1f} against {speed['trl']:.1f} answers/s; {answers} answers a round, "
        f"of {means['ours']:.1f} and {means['trl']:.1f} tokens; our seconds {split}"
    )
    return {
        "ratio": median,
        "ratio_quartiles": [low, high],
        "answers_per_s": speed,
        "answer_tokens": means,
        "seconds": seconds,
        "parts_s": split,
        "peer": peer,
    }


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--trl-python", type=Path, required=True, help="Python of an environment with TRL")
    add("--tasks", nargs="+", default=["handwriting:add"], help="whose questions are asked")
    add("--prompts", type=int, default=8, help="questions of a round")
    add("--group", type=int, default=16, help="answers to each")
    add("--updates", type=int, default=4, help="updates of a round")
    add("--max-answer-tokens", type=int, default=64)
    add("--precision", choices=("model", "packed"), default="packed", help="of our engine")
    add("--equal-prompts", type=int, default=2, help="questions of the equal loss")
    add("--repeats", type=int, default=10, help="timed rounds of each side")
    add("--threads", type=int, default=2, help="threads of ours")
    add("--peer-threads", type=int, default=2)
    add("--peer-batch", type=int, default=16, help="answers of a micro-batch of the peer")
    add("--out", type=Path, default=None, help="also write the JSON here")
    return parser.parse_args()


def main() -> None:
    """Compare and print."""
    args = parse()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    config = config_of(args)
    model, processor = cascadevl.load("micro", dtype=torch.float32)
    assert isinstance(model, CascadeVLForConditionalGeneration)
    asked = draw_questions(config, processor, args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save(model, processor, folder / "model")
        write_prompts(asked, processor, folder / "prompts.safetensors")
        stops = {"stop_token_ids": list(processor.builder.stop_token_ids)}
        (folder / "stops.json").write_text(json.dumps(stops), encoding="utf-8")
        trl = Trl(args.trl_python, folder, "trl_gspo_side.py")
        losses = prove_equal(trl, config, asked, args.equal_prompts)
        result = compare(trl, config, asked, args)
        trl.process.communicate(json.dumps({"do": "exit"}) + "\n")
    prompt_tokens = [num_tokens(each.prompt, processor.tokens_per_tile) for each in asked]
    document = {
        "benchmark": "gspo",
        "peer_versions": trl.versions,
        "losses": losses,
        "prompt_tokens": statistics.mean(prompt_tokens),
        **result,
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }
    if args.out is not None:
        args.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
