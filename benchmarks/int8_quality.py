"""What packing and int8 do to a trained model: held-out loss, scores, and how many answers stay.

The model is examined as it was saved, in bfloat16; packed; in int8; and in int8 with the head
packed, or the other way round. Loss is measured on
held-out records of the sources it was fine-tuned on; questions are those of its recipe's
examination, answered greedily. Without ``--model`` nano is trained first, as the demo does but
shorter. The last line is one JSON document.
Run: ``python benchmarks/int8_quality.py --model runs/demo/model``, or with ``--recipe micro``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from experiment import fine_tuned

import cascadevl
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.source import Source
from cascadevl.engine.packed_weights import pack
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import run_suite
from cascadevl.model.modeling import CascadeVLForConditionalGeneration as Model
from cascadevl.scoring.metrics import accuracy
from cascadevl.tasks.base import TaskSource
from cascadevl.train.config import DataConfig
from cascadevl.workflows import micro, nano
from cascadevl.workflows.demo import ANSWER_TOKENS
from cascadevl.workflows.held_out import held_out_losses

SEED = 5


SUITES = {"nano": nano.suite, "micro": micro.suite}


def sources(recipe: str) -> dict[str, Source]:
    """What the model was fine-tuned on, from the held-out part of the material."""
    found: dict[str, Source] = {}
    for each in nano.sft_sources() if recipe == "nano" else micro.sources("sft"):
        assert isinstance(each.source, TaskSource)
        found[each.source.name] = replace(each.source, split="test", seed=SEED)
    return found


@torch.inference_mode()
def examine(
    model: Model, processor: CascadeVLProcessor, args: argparse.Namespace
) -> dict[str, Any]:
    """Losses by source, and every answer with whether it is right."""
    losses = held_out_losses(
        model,
        processor,
        sources(args.recipe),
        DataConfig(max_tokens=2048),
        num_examples=args.examples,
        seed=SEED,
    )
    responder = ModelResponder(model=model, processor=processor, max_new_tokens=args.max_new_tokens)
    scores = run_suite(responder, SUITES[args.recipe](args.questions), seed=SEED)
    answered = [each for score in scores for each in score.answered]
    return {
        "losses": losses,
        "answers": [each.response for each in answered],
        "right": [each.right for each in answered],
    }


def compared(found: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a precision, the plain model first."""
    plain = next(iter(found.values()))
    rows = []
    for name, each in found.items():
        loss = sum(each["losses"].values()) / len(each["losses"])
        same = [a == b for a, b in zip(each["answers"], plain["answers"], strict=True)]
        worst = max(
            (each["losses"][source] - before for source, before in plain["losses"].items()), key=abs
        )
        rows.append(
            {
                "precision": name,
                "loss": loss,
                "perplexity": math.exp(loss),
                "largest_change": worst,
                "right": accuracy(each["right"]).value,
                "equal_answers": accuracy(same).value,
                "equal_interval": (accuracy(same).low, accuracy(same).high),
                "num_answers": len(same),
                "language_bytes": each["bytes"],
            }
        )
    return rows


def main() -> None:
    """Examine the same model in every precision and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint; trained here if left out")
    parser.add_argument("--recipe", choices=SUITES, default="nano", help="what it learned")
    parser.add_argument("--runs", type=Path, default=Path("runs/int8_quality"))
    parser.add_argument("--steps", type=int, default=400, help="of each stage, if trained here")
    parser.add_argument("--examples", type=int, default=200, help="held-out records of a source")
    parser.add_argument("--questions", type=int, default=200, help="of each row of the suite")
    parser.add_argument("--max-new-tokens", type=int, default=ANSWER_TOKENS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.model is None and args.recipe != "nano":
        parser.error(f"the recipe {args.recipe} takes hours: give its --model")
    path = args.model or fine_tuned(args.runs, args.steps)
    model, processor = cascadevl.load(path, dtype=torch.bfloat16)
    packed = {
        "packed bf16": pack(model, "packed"),
        "int8": pack(model, "int8"),
        "int8, head packed bf16": pack(model, "int8", head="packed"),
        "packed bf16, head int8": pack(model, "packed", head="int8"),
    }
    num_bytes = packed["int8"].size.plain
    found = {"bf16": examine(model, processor, args) | {"bytes": num_bytes}}
    for name, each in packed.items():
        found[name] = examine(each.model, processor, args) | {"bytes": each.size.packed}
    rows = compared(found)
    print(
        "| precision | held-out loss | perplexity | largest change of a source | right, % | "
        "equal greedy answers, % (95 %) | bytes of linear layers |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["equal_interval"]
        print(
            f"| {row['precision']} | {row['loss']:.4f} | {row['perplexity']:.4f} | "
            f"{row['largest_change']:+.4f} | {100 * row['right']:.1f} | "
            f"{100 * row['equal_answers']:.1f} ({100 * low:.1f}-{100 * high:.1f}) | "
            f"{row['language_bytes']:,} |"
        )
    print(f"{rows[0]['num_answers']} answers; {path}")
    document = json.dumps({"model": str(path), "rows": rows})
    if args.out:
        args.out.write_text(document, "utf-8")
    print(document)


if __name__ == "__main__":
    main()
