"""The best of N against one answer, and what judging adds: 7 tiles, answers of 128 tokens.

Three things are timed, interleaved, each repetition with a picture nobody has seen:

* ``draw``: N answers to a prompt against one. They share the prompt and its visual tokens, and a
  step of decoding computes all of them. Aim of issue 8: N = 8 in at most 3 times the time of one.
* ``shared``: judging these N by a reward model that is an adapter of the answering model. It takes
  the engine's visual tokens and reads the prompt once. Aim: at most 15 % of drawing and judging.
* ``separate``: judging by a reward model of its own, which also encodes the picture. Reported.

Proven first, on nano in float32 and then within rounding at the measured shape: the first of N
answers is the one answer; the adapter's scores are those it gives with a vision half of its own;
and every score is that of its solution alone. What is judged are solutions of known length, six
steps each (VisualPRM: 5.6), since random weights write no steps.

Ratios hold for the weights as they are stored; ``--weights packed`` or ``int8`` times drawing with
packed ones, and the separate judge. Run: ``python benchmarks/bench_best_of_n.py --threads 2``;
``--tiny`` proves in a minute that it works. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from bench_engine import Machine, measure_machine, quartiles

from cascadevl.data.collate import num_tokens
from cascadevl.data.process_records import StepBuilder
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.prompts import PROCESS_REWARD_SYSTEM
from cascadevl.data.tiling import TilingConfig
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.engine.engine import Engine
from cascadevl.engine.packed_weights import Precision, pack
from cascadevl.engine.process_reward import ProcessRewardConfig, ProcessRewardModel
from cascadevl.engine.requests import EngineConfig, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.host_memory import keep_freed_memory
from cascadevl.model.adapters import adapter_parameters, sharing
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.presets import nano_config
from cascadevl.model.zoo import config_for
from cascadevl.scoring.steps import split_steps
from cascadevl.train.lora import LoraConfig, add_adapters
from cascadevl.types import Example, ImageRef, Message

NUM_TILES, NUM_STEPS = 7, 6
QUESTION = "\nWhat is the sum of all numbers in the picture?"
WORDS = "first we add the two numbers that stand in the upper row and then those below"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """A model with random weights, and what it is asked.

    Attributes:
        model: Answers.
        processor: Its processor.
        num_samples: N.
        new_tokens: Tokens of an answer.
    """

    model: CascadeVLForConditionalGeneration
    processor: CascadeVLProcessor
    num_samples: int
    new_tokens: int

    def question(self, seed: int) -> list[Message]:
        """A question about a picture of seven tiles; another seed is another picture."""
        px = self.processor.tiling.tile_px
        pixels = np.random.default_rng(seed).integers(0, 255, (2 * px, 3 * px, 3), dtype=np.uint8)
        return [Message.of("user", ImageRef(PIL.Image.fromarray(pixels)), QUESTION)]

    def request(self, prompt: Example, num_samples: int) -> Request:
        """A question with so many answers of the full length."""
        sampling = SamplingParams(
            temperature=0.7, seed=1, max_tokens=self.new_tokens, ignore_eos=True
        )
        return Request(prompt=prompt, sampling=sampling, num_samples=num_samples)

    def solutions(self) -> list[str]:
        """N solutions of six steps, together as long as an answer."""
        words = WORDS.split()
        found = []
        for number in range(self.num_samples):
            order = np.random.default_rng(number).permutation(len(words))
            text = [words[place] for place in order.tolist()] * self.new_tokens
            size = max(1, self.new_tokens // (2 * NUM_STEPS))
            while self._length(text, size + 1) <= self.new_tokens:
                size += 1
            found.append(self._solution(text, size))
        return found

    def _solution(self, words: list[str], size: int) -> str:
        steps = [words[place * size : (place + 1) * size] for place in range(NUM_STEPS)]
        return "\n\n".join(" ".join(step) for step in steps)

    def _length(self, words: list[str], size: int) -> int:
        return len(self.processor.tokenizer(self._solution(words, size)).input_ids)


def make_world(*, tiny: bool, num_samples: int) -> World:
    """The model: InternVL3-1B's shape in bfloat16, or nano in float32 for a trial."""
    tokenizer = build_tokenizer([PROCESS_REWARD_SYSTEM, QUESTION, WORDS] * 20, 1200)
    px, tokens_per_tile = (112, 16) if tiny else (448, 256)
    processor = CascadeVLProcessor(
        tokenizer,
        system_message="",
        tiling=TilingConfig(tile_px=px, max_tiles=12),
        tokens_per_tile=tokens_per_tile,
    )
    torch.manual_seed(0)
    config = nano_config(len(tokenizer)) if tiny else config_for("InternVL3-1B")
    config.image_token_id = processor.image_token_id
    dtype = torch.float32 if tiny else torch.bfloat16
    model = CascadeVLForConditionalGeneration(config).to(dtype).eval()
    with torch.no_grad():  # random weights have no opinion: context counts, logits deviate by 1
        model.model.language_model.norm.weight.mul_(50 / config.text_config.hidden_size**0.5)
        for name, weight in model.model.language_model.layers.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(10)
    return World(
        model=model,
        processor=processor,
        num_samples=num_samples,
        new_tokens=24 if tiny else 128,
    )


def adapted(model: CascadeVLForConditionalGeneration) -> CascadeVLForConditionalGeneration:
    """The model with an adapter beside its language half that changes what it says."""
    second = sharing(model)
    assert isinstance(second, CascadeVLForConditionalGeneration)
    add_adapters(second, LoraConfig(), seed=0)
    with torch.no_grad():
        for parameter in adapter_parameters(second).values():
            parameter.normal_(std=0.02)
    return second.eval()


def made(
    world: World, config: ProcessRewardConfig
) -> tuple[Engine, ProcessRewardModel, dict[str, float]]:
    """An engine, a judge that shares its model, and the proof that both are right."""
    engine = Engine(world.model, world.processor, EngineConfig(cache_bytes=2**30))
    encode = engine.visual_tokens
    judge = ProcessRewardModel(adapted(world.model), world.processor, config, encode=encode)
    return engine, judge, prove(world, engine, judge)


def prove(world: World, engine: Engine, shared: ProcessRewardModel) -> dict[str, float]:
    """Show that nothing is given away for speed; the largest gaps, and how far scores lie apart."""
    question, solutions = world.question(1), world.solutions()
    prompt = world.processor.prompt(question)
    if prompt.num_tiles != NUM_TILES:
        raise SystemExit(f"the picture has {prompt.num_tiles} tiles, not {NUM_TILES}")
    (one,) = engine.generate([world.request(prompt, 1)])[0]
    several = engine.generate([world.request(prompt, world.num_samples)])[0]
    own = ProcessRewardModel(shared.model, world.processor)
    found, again = shared(question, solutions), own(question, solutions)
    alone = [shared(question, [text])[0] for text in solutions]
    gap = max(abs(a.score - b.score) for a, b in zip(found, again, strict=True))
    lone = max(abs(a.score - b.score) for a, b in zip(found, alone, strict=True))
    scores = [each.score for each in found]
    spread = max(scores) - min(scores)
    exact = world.model.dtype == torch.float32
    if exact and one.token_ids != several[0].token_ids:
        raise SystemExit("the first of several answers is not the one answer")
    if max(gap, lone) > (1e-4 if exact else 0.03):
        raise SystemExit(f"scores differ by {gap:.2g} (shared) and {lone:.2g} (alone)")
    if exact and spread < 100 * max(gap, lone, 1e-6):
        raise SystemExit(f"scores lie within {spread:.2g} of each other, which proves nothing")
    return {"shared": gap, "alone": lone, "spread": spread}


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What arithmetic says, if only the machine's limits counted.

    Attributes:
        ratio: Time of N answers by the time of one.
        shared: Share of judging with a shared vision half.
        separate: Share of judging with one of its own.
    """

    ratio: float
    shared: float
    separate: float


def expected(world: World, machine: Machine) -> Expected:
    """Operations of encoding and reading, bytes and operations of decoding, by the machine's."""
    model, processor, question = world.model, world.processor, world.question(0)
    text = [*model.model.language_model.layers.parameters(), *model.lm_head.parameters()]
    layers = sum(p.numel() for p in model.model.language_model.layers.parameters())
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    prompt = processor.prompt(question)
    steps = [split_steps(each) for each in world.solutions()]
    candidates = StepBuilder(processor.builder).candidates(question[0], steps, source="x")
    patches = ((processor.tiling.tile_px // 14) ** 2 + 1) * prompt.num_tiles
    encode = 2 * tower * patches / machine.flops_per_s
    read, judge = (
        2 * layers * num_tokens(each, processor.tokens_per_tile) / machine.flops_per_s
        for each in (prompt, candidates)
    )

    def draw(answers: int) -> float:
        weights = sum(p.nbytes for p in text) / machine.bytes_per_s
        compute = 2 * answers * sum(p.numel() for p in text) / machine.flops_per_s
        return encode + read + (world.new_tokens - 1) * max(weights, compute)

    several = draw(world.num_samples)
    return Expected(
        ratio=several / draw(1),
        shared=judge / (several + judge),
        separate=(encode + judge) / (several + encode + judge),
    )


def seconds(work: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(
    world: World, engine: Engine, judges: dict[str, ProcessRewardModel], repeats: int
) -> dict[str, list[float]]:
    """Seconds of one answer, of N, and of every judge, each repetition in turn."""
    solutions, requests = world.solutions(), {"one": 1, "several": world.num_samples}
    found: dict[str, list[float]] = {name: [] for name in (*requests, *judges)}
    for repetition in range(repeats + 1):  # the first one warms up and does not count
        times: dict[str, float] = {}
        question = world.question(0)
        for place, (name, number) in enumerate(requests.items()):
            question = world.question(10 + 2 * repetition + place)
            asked = world.request(world.processor.prompt(question), number)
            times[name] = seconds(partial(engine.generate, [asked]))
        for name, judge in judges.items():
            times[name] = seconds(partial(judge, question, solutions))
        for name, value in times.items() if repetition else ():
            found[name].append(value)
    return found


def summarise(
    world: World, times: dict[str, list[float]], predicted: Expected, gaps: dict[str, float]
) -> dict[str, Any]:
    """Ratios with their quartiles, printed as they are made."""
    ratios = [a / b for a, b in zip(times["several"], times["one"], strict=True)]
    low, median, high = quartiles(ratios)
    print(
        f"draw: {world.num_samples} answers take {median:.2f}x the time of one (quartiles "
        f"{low:.2f}-{high:.2f}), {predicted.ratio:.2f}x by the limits of the machine; aim 3.00x"
    )
    document: dict[str, Any] = {
        "num_samples": world.num_samples,
        "new_tokens": world.new_tokens,
        "draw": {"ratio": [low, median, high], "expected": predicted.ratio, "aim": 3.0},
        "gaps": gaps,
        "seconds": times,
    }
    for name, by_counts in (("shared", predicted.shared), ("separate", predicted.separate)):
        if name not in times:
            continue
        shares = [j / (j + d) for j, d in zip(times[name], times["several"], strict=True)]
        low, median, high = quartiles(shares)
        aim = "; aim 15.0 %" if name == "shared" else ""
        print(
            f"{name}: judging is {100 * median:.1f} % of the whole (quartiles {100 * low:.1f}-"
            f"{100 * high:.1f}), {100 * by_counts:.1f} % by the limits of the machine{aim}"
        )
        document[name] = {"share": [low, median, high], "expected": by_counts}
    return document


def main() -> None:
    """Prove, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-samples", type=int, default=8, metavar="N")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", choices=("stored", "packed", "int8"), default="stored")
    parser.add_argument("--chunk", type=int, help="solutions judged in one forward")
    parser.add_argument("--tiny", action="store_true", help="nano, to see that it works")
    parser.add_argument("--out", type=Path, help="write the JSON document here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    config = ProcessRewardConfig(chunk=arguments.chunk)
    made(make_world(tiny=True, num_samples=arguments.num_samples), config)
    world = make_world(tiny=arguments.tiny, num_samples=arguments.num_samples)
    machine = measure_machine(world.model.dtype, tiny=arguments.tiny)
    engine, judge, gaps = made(world, config)
    judges = {
        "shared": judge,
        "separate": ProcessRewardModel(copy.deepcopy(world.model), world.processor, config),
    }
    if arguments.weights != "stored":
        precision: Precision = arguments.weights
        engine = Engine(
            pack(world.model, precision), world.processor, EngineConfig(cache_bytes=2**30)
        )
        del judges["shared"]  # there is nothing to put an adapter beside
    times = measure(world, engine, judges, arguments.repeats)
    document = summarise(world, times, expected(world, machine), gaps)
    document |= {"threads": arguments.threads, "weights": arguments.weights}
    document["tiny"] = arguments.tiny
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
