"""The hallucination guard on a benchmark of existence: F1, accuracy and share of yes.

Three ways to answer "Is there a red circle?": asked directly; by listing what is there and looking
whether the list names it, as somebody does who reads a description; and the list behind the guard,
with its default limits and with limits that were calibrated on other pictures. Lists are drawn at a
temperature, because a model makes things up more readily then; probes are not. Negatives are
random, popular and adversarial, as in POPE; pictures are the same for all. Of the lists it also
says which share of the claims is false, and how many true ones the guard takes away.
With --pope FILE --images DIR released files of POPE are asked directly, with and without the guard.
Prints tables in Markdown; the last line is one JSON document.
Run: ``python benchmarks/guard.py [--model micro] [--questions 200] [--seeds 11 12 13]``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cascadevl
from cascadevl.engine.engine import Engine
from cascadevl.engine.engine_backend import EngineBackend
from cascadevl.engine.guard import Guard, GuardConfig
from cascadevl.eval.existence import existence_of, existence_rows, pope_row
from cascadevl.eval.guarded import Guarded, calibrated
from cascadevl.eval.responder import ModelResponder, Responder
from cascadevl.eval.runner import Score, run_suite
from cascadevl.eval.suite import SuiteRow, draw_row
from cascadevl.scoring.metrics import accuracy
from cascadevl.scoring.verdicts import Limits
from cascadevl.tasks.base import to_prompt
from cascadevl.types import ImageRef, Message

CALIBRATION_SEED = 900
LIST = "List all shapes."


@dataclass(frozen=True, slots=True, kw_only=True)
class Teller:
    """Says yes to what somebody's list of the picture names, and no to everything else.

    Attributes:
        lister: Lists.
        prompt: Asks for the list.
    """

    lister: Responder
    prompt: str = LIST

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """One answer for each conversation, in order."""
        lists = self.lister([listing(each, self.prompt) for each in conversations])
        return [
            "yes" if named(talk) in text else "no"
            for talk, text in zip(conversations, lists, strict=True)
        ]


def listing(conversation: Sequence[Message], prompt: str) -> list[Message]:
    """The same pictures with another question."""
    pictures = [part for part in conversation[-1].parts if isinstance(part, ImageRef)]
    return [Message("user", (*pictures, f"\n{prompt}"))]


def named(conversation: Sequence[Message]) -> str:
    """What is asked for."""
    found = re.search(r"Is there an? (.+)\?", conversation[-1].text)
    if found is None:
        raise SystemExit(f"{conversation[-1].text!r} asks for no object")
    return found[1]


def main() -> None:
    """Ask, check, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="micro")
    parser.add_argument("--questions", type=int, default=200, help="of each row and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--temperature", type=float, default=1.0, help="of lists")
    parser.add_argument("--precision", type=float, default=0.95, help="that limits are to reach")
    parser.add_argument("--pope", type=Path, nargs="*", default=[], help="released files")
    parser.add_argument("--images", type=Path, help="folder of their pictures")
    args = parser.parse_args()
    model, processor = cascadevl.load(args.model)
    own = ModelResponder(model=model, processor=processor)
    lister = replace(own, temperature=args.temperature)
    backend = EngineBackend(engine=Engine(model, processor))
    plain = Guarded(responder=own, backend=backend, guard=Guard(processor=processor))
    if args.pope:
        rows = [pope_row(path, args.images) for path in args.pope]
        arms: dict[str, Responder] = {"asked": own, "asked, guard": plain}
        found = {name: measured(arm, rows, [0]) for name, arm in arms.items()}
        print_table(found)
        print(json.dumps({"model": args.model, "scores": found}))
        return
    px = processor.tiling.tile_px
    rows = list(existence_rows(px=px, num_questions=args.questions))
    limits = limits_of(plain, rows, args.precision)
    plain = replace(plain, responder=lister)
    tuned = replace(plain, guard=replace(plain.guard, config=GuardConfig(limits=limits)))
    arms = {
        "asked": own,
        "listed": Teller(lister=lister),
        "listed, guard": Teller(lister=plain),
        "listed, guard calibrated": Teller(lister=tuned),
    }
    found = {name: measured(arm, rows, args.seeds) for name, arm in arms.items()}
    print(f"limits by {args.precision} on training pictures: {limits}\n")
    print_table(found)
    claims = {
        name: claims_of_lists(guarded, rows[0], args.seeds)
        for name, guarded in (("guard", plain), ("guard calibrated", tuned))
    }
    print_claims(claims)
    facts = {key: getattr(args, key) for key in ("model", "questions", "seeds", "temperature")}
    print(json.dumps({**facts, "limits": asdict(limits), "scores": found, "claims": claims}))


def limits_of(guarded: Guarded, rows: Sequence[SuiteRow], precision: float) -> Limits:
    """Limits that were calibrated on pictures of the training part."""
    asked = [each for row in rows for each in draw_row(row, split="train", seed=CALIBRATION_SEED)]
    return calibrated(
        guarded,
        [to_prompt(each.scene, each.question) for each in asked],
        [each.question.answer == "yes" for each in asked],
        precision=precision,
    )


def measured(
    responder: Responder, rows: Sequence[SuiteRow], seeds: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Scores of each row over all seeds."""
    scores = [score for seed in seeds for score in run_suite(responder, rows, seed=seed)]
    print(f"{responder.__class__.__name__} asked", file=sys.stderr, flush=True)
    return {row.label: asdict(existence_of(together(row, scores))) for row in rows}


def together(row: SuiteRow, scores: Sequence[Score]) -> Score:
    """One row's answers of all seeds."""
    own = [score for score in scores if score.row == row.name]
    answered = tuple(each for score in own for each in score.answered)
    return replace(own[0], answered=answered)


def claims_of_lists(
    guarded: Guarded, row: SuiteRow, seeds: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Of all claims in lists, which are false, before and after; how many true ones are lost."""
    asked = [each for seed in seeds for each in draw_row(row, split="test", seed=seed)]
    found = guarded.verified(
        [listing(to_prompt(each.scene, each.question), LIST) for each in asked]
    )
    judged = [
        (check.verdict, is_true(check.claim.text, each.scene.description))
        for each, one in zip(asked, found, strict=True)
        for check in one.checks
    ]
    before = [not true for _, true in judged]
    after = [not true for verdict, true in judged if verdict != "withdrawn"]
    sure = [not true for verdict, true in judged if verdict == "kept"]
    lost = [verdict == "withdrawn" for verdict, true in judged if true]
    kinds = {
        "false": before, "false, not withdrawn": after, "false, kept": sure,
        "true ones withdrawn": lost,
    }  # fmt: skip
    return {name: asdict(accuracy(each)) for name, each in kinds.items()}


def is_true(claim: str, description: str) -> bool:
    """Whether a list names something that is in the picture, wherever it stands."""
    return " ".join(claim.split()[:2]) in description


def print_table(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Scores as a Markdown table."""
    print("| answered | negatives | F1 | accuracy | yes | unclear |\n|---|---|---|---|---|---|")
    for name, rows in found.items():
        for label, score in rows.items():
            cells = [shown(score[key]) for key in ("f1", "accuracy", "yes_share")]
            print(f"| {name} | {label} | {' | '.join(cells)} | {score['num_unclear']} |")
    print()


def print_claims(found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Claims of lists as a Markdown table."""
    print("| lists | share of claims | 95 % interval | of |\n|---|---|---|---|")
    for name, kinds in found.items():
        for kind, share in kinds.items():
            print(f"| {name} | {kind} | {shown(share)} | {share['num']} |")
    print()


def shown(estimate: dict[str, float]) -> str:
    """A share with its interval, in per cent."""
    low, high = 100 * estimate["low"], 100 * estimate["high"]
    return f"{100 * estimate['value']:.1f} ({low:.1f}-{high:.1f})"


if __name__ == "__main__":
    main()
