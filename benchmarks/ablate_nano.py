"""What each choice of the nano recipe is worth: the same short run with one thing changed.

Every variant trains nano from random weights for the same number of steps on the mixture of the
demo's SFT stage, with a cosine that ends there, and is then asked held-out questions. Scores do
not depend on the machine; milliseconds a step do, and are only comparable on a quiet one.
Run: ``python benchmarks/ablate_nano.py --steps 500 --variants demo adamw``. The last line is one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import run_suite
from cascadevl.model.loading import load
from cascadevl.train.config import TrainConfig
from cascadevl.train.pretrain import pretrain
from cascadevl.workflows import nano

EXAM_SEED = 77
ANSWER_TOKENS = 32

VARIANTS: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    "demo": lambda c: c,
    "adamw": lambda c: replace(c, optim=replace(c.optim, name="adamw")),
    "adamw, lr 2e-3": lambda c: replace(c, optim=replace(c.optim, name="adamw", lr=2e-3)),
    "16 pictures a step": lambda c: replace(c, batch=replace(c.batch, row_samples=16)),
    "64 pictures a step": lambda c: replace(c, batch=replace(c.batch, row_samples=64)),
    "float32 weights": lambda c: replace(c, model=replace(c.model, precision="float32")),
    "token averaging": lambda c: replace(c, batch=replace(c.batch, averaging="token")),
    "no JPEG": lambda c: replace(c, data=replace(c.data, jpeg=False)),
    "compiled bodies": lambda c: replace(c, run=replace(c.run, compile=True)),
}


def main() -> None:
    """Run the variants one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--questions", type=int, default=300, help="held-out questions a row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=nano.SEED)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for name in args.variants:
        results[name] = run_variant(name, args.steps, args.questions, args.seed)
        scores = ", ".join(f"{row} {value:.0f}" for row, value in results[name]["scores"].items())
        print(f"{name}: {results[name]['ms_per_step']:.0f} ms a step; {scores}", flush=True)
    print(json.dumps({"steps": args.steps, "questions": args.questions, "variants": results}))


def run_variant(name: str, num_steps: int, num_questions: int, seed: int) -> dict[str, object]:
    """Train one variant and examine it; percent right of each row, and the time of a step."""
    folder = Path(tempfile.mkdtemp(prefix="ablate-nano-"))
    try:
        config = nano.stage_config("sft", folder, num_steps=num_steps, model=None)
        run = replace(config.run, eval_interval=0, checkpoint_interval=0, seed=seed)
        config = VARIANTS[name](replace(config, run=run))
        began_s = time.perf_counter()
        result = pretrain(
            config,
            sources=nano.sft_sources(),
            tokenizer=nano.tokenizer(),
            console=Console(quiet=True),
        )
        elapsed_s = time.perf_counter() - began_s
        model, processor = load(str(result.model_path), dtype=torch.bfloat16)
        responder = ModelResponder(
            model=model.eval(), processor=processor, max_new_tokens=ANSWER_TOKENS
        )
        scores = run_suite(responder, nano.suite(num_questions), seed=EXAM_SEED)
    finally:
        shutil.rmtree(folder)
    return {
        "ms_per_step": 1000 * elapsed_s / num_steps,
        "loss": result.loss,
        "scores": {score.row: 100 * score.estimate.value for score in scores},
    }


if __name__ == "__main__":
    main()
