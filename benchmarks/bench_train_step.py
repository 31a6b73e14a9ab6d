"""One training step of nano: ours against plain transformers, on the same questions.

Both learn the same answers about the same pictures from the same weights. Plain transformers
(`InternVLForConditionalGeneration`) gets padded rows with a mask, bfloat16 autocast and AdamW, with
eager and with sdpa attention, of which the quicker is compared. Ours gets packed rows, bfloat16
weights with float32 masters, and the head at the targets only. Two forms of the same work:

- ``turns``: all questions about a picture in one conversation, token for token the same rows;
- ``branches``: each question answered on its own. Plain transformers needs a row, and a pass of
  the vision tower, for each; here the branches of a picture share both.

Equal losses are proven first, in float32. The steps are interleaved. The last line is one JSON
document. Run: ``python benchmarks/bench_train_step.py --repeats 20 --threads 2``.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from experiment import Given
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from cascadevl.data.collate import collate
from cascadevl.data.example import ExampleBuilder
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import normalise
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.sequence import expand
from cascadevl.tasks.base import TaskSource
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.shapes import Shapes
from cascadevl.train.config import DataConfig, ModelConfig
from cascadevl.train.loop import TrainState, update
from cascadevl.train.objective import NEXT_TOKEN
from cascadevl.train.optim import OptimConfig, Optimiser
from cascadevl.train.sources import example_config
from cascadevl.train.start import from_scratch, make_trainable
from cascadevl.types import NO_PARENT, Batch, Example, Record

FORMS = ("turns", "branches")
PEER_ATTENTION = ("eager", "sdpa")


@dataclass(frozen=True, slots=True)
class Counts:
    """What a step goes through, and its multiply-adds as floating point operations."""

    tokens: int
    tiles: int
    logits: int
    flops: float


@dataclass(frozen=True, slots=True)
class PeerBatch:
    """Padded rows as plain transformers takes them."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    pixel_values: Tensor


def as_turns(record: Record) -> Record:
    """All branches of a record as one conversation."""
    first, *others = record.branches
    opening = replace(record.messages[-1], parts=(*record.messages[-1].parts, *first[0].parts))
    turns = [opening, *first[1:], *(turn for branch in others for turn in branch)]
    return replace(record, messages=(*record.messages[:-1], *turns), branches=())


def examples_of(
    processor: CascadeVLProcessor, records: Sequence[Record], data: DataConfig
) -> list[Example]:
    """The records as the model sees them."""
    builder = ExampleBuilder(
        processor.tokenizer, example_config(data, processor, 0), processor.tokens_per_tile
    )
    return [builder(record) for record in records]


def peer_batch(
    examples: Sequence[Example], *, image_token_id: int, tokens_per_tile: int, pad_token_id: int
) -> PeerBatch:
    """Every branch as a row of its own, padded on the right."""
    ids: list[Tensor] = []
    labels: list[Tensor] = []
    tiles: list[Tensor] = []
    for example in examples:
        whole = expand(
            example.input_ids,
            example.trained,
            example.segments,
            example.parents,
            image_token_id=image_token_id,
            tokens_per_image=[n * tokens_per_tile for n in example.tiles_per_image],
            increments=example.increments,
        )
        own = [n for n in range(len(example.parents)) if n not in example.parents]
        for segment in own:
            parent = example.parents[segment]
            taken = whole.segments == segment
            if parent != NO_PARENT:
                taken |= whole.segments == parent
            row = torch.from_numpy(whole.input_ids[taken])
            ids.append(row)
            labels.append(row.masked_fill(~torch.from_numpy(whole.trained[taken]), -100))
            tiles.append(normalise(example.tiles))
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad(ids, batch_first=True, padding_value=pad_token_id)
    mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
    return PeerBatch(
        input_ids, mask, pad(labels, batch_first=True, padding_value=-100), torch.cat(tiles)
    )


def counts(
    model: CascadeVLForConditionalGeneration, tokens: int, tiles: int, logits: int
) -> Counts:
    """Matrix products of forward and backward; attention scores and element-wise work left out."""
    config = model.config

    def entries(part: torch.nn.Module) -> int:
        return sum(p.numel() for p in part.parameters() if p.ndim == 2)

    body = entries(model.model.language_model)
    body -= model.get_input_embeddings().weight.numel()
    patches = (config.tile_px // config.vision_config.patch_size[0]) ** 2 + 1
    tile = entries(model.model.vision_tower) * patches
    tile += entries(model.model.multi_modal_projector) * config.tokens_per_tile
    head = config.text_config.vocab_size * config.text_config.hidden_size
    return Counts(tokens, tiles, logits, 6.0 * (body * tokens + tile * tiles + head * logits))


def our_step(model: CascadeVLForConditionalGeneration, batch: Batch) -> Callable[[], float]:
    """One optimiser step of ours, in bfloat16 with float32 masters."""
    accelerator = Accelerator(cpu=True)
    make_trainable(model, ModelConfig(precision="bfloat16"), accelerator)
    state = TrainState(
        model=model,
        optimiser=Optimiser(model.named_parameters(), OptimConfig(lr=1e-4)),
        stream=Given(batch),
        accelerator=accelerator,
    )

    def step() -> float:
        update(state, [next(state.stream)], NEXT_TOKEN)
        state.optimiser.step(1.0)
        state.optimiser.zero_grad()
        return state.metrics["loss"]

    return step


def peer_step(model: InternVLForConditionalGeneration, batch: PeerBatch) -> Callable[[], float]:
    """One optimiser step of plain transformers, in bfloat16 autocast."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = peer_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return float(loss.detach())

    return step


def peer_loss(model: InternVLForConditionalGeneration, batch: PeerBatch) -> Tensor:
    """Plain transformers' own loss: the mean over all targets."""
    loss: Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=batch.pixel_values,
        labels=batch.labels,
        use_cache=False,
    ).loss
    return loss


def peer_model(
    model: CascadeVLForConditionalGeneration, attention: str
) -> InternVLForConditionalGeneration:
    """Plain transformers with the same weights."""
    config = type(model.config).__mro__[1].from_dict(model.config.to_dict())
    peer = InternVLForConditionalGeneration._from_config(config, attn_implementation=attention)
    peer.load_state_dict(model.state_dict())
    return peer


def prove_equal(model: CascadeVLForConditionalGeneration, batch: Batch, peers: PeerBatch) -> float:
    """The loss of both in float32, after asserting that they are equal."""
    model.eval()
    with torch.no_grad():
        weight = NEXT_TOKEN.weigh(batch)
        ours = NEXT_TOKEN.loss(model, batch, weight).loss
        for attention in PEER_ATTENTION:
            peer = peer_model(model, attention).eval()
            torch.testing.assert_close(ours, peer_loss(peer, peers), rtol=1e-5, atol=1e-5)
    return float(ours)


def time_interleaved(
    steps: dict[str, Callable[[], float]], repeats: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of every step, each repeat running all of them one after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(warmup + repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def compare(form: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Prove equal losses for one form of the questions, then time it."""
    tasks = [Handwriting(px=112), Shapes(px=112)]
    drawn = [TaskSource(task=task, length=arguments.pictures) for task in tasks]
    records = [drawn[n % 2][n // 2] for n in range(arguments.pictures)]
    texts = [m.text for r in records for turns in (r.messages, *r.branches) for m in turns]
    tokenizer = build_tokenizer(texts, arguments.vocab_size)
    start = ModelConfig(preset="nano", precision="float32")
    model, processor = from_scratch(start, tokenizer, seed=0)
    data = DataConfig(jpeg=False, max_tokens=4096)
    if form == "turns":
        records = [as_turns(record) for record in records]
    examples = examples_of(processor, records, data)
    rows = [examples[n :: arguments.rows] for n in range(arguments.rows)]
    batch = collate(
        rows,
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tokens_per_tile=processor.tokens_per_tile,
        averaging="token",
    )
    peers = peer_batch(
        examples,
        image_token_id=processor.image_token_id,
        tokens_per_tile=processor.tokens_per_tile,
        pad_token_id=tokenizer.pad_token_id,
    )
    loss = prove_equal(model, batch, peers)
    ours = counts(model, batch.input_ids.numel(), batch.num_tiles, len(batch.target_ids))
    theirs = counts(
        model, peers.input_ids.numel(), len(peers.pixel_values), peers.input_ids.numel()
    )
    steps = {name: peer_step(peer_model(model, name), peers) for name in PEER_ATTENTION}
    if arguments.compile:
        compiled = copy.deepcopy(model)
        compiled.model.vision_tower.compile()
        compiled.model.language_model.compile()
        steps = {"ours, compiled": our_step(compiled, batch), **steps}
    steps = {"ours": our_step(model, batch), **steps}
    seconds = time_interleaved(steps, arguments.repeats, arguments.warmup)
    peer = min(PEER_ATTENTION, key=lambda name: statistics.median(seconds[name]))
    ratios = [b / a for a, b in zip(seconds["ours"], seconds[peer], strict=True)]
    low, median, high = quartiles(ratios)
    expected = theirs.flops / ours.flops
    print(
        f"{form}: {median:.2f}x (quartiles {low:.2f}-{high:.2f}, {arguments.repeats} repeats) the "
        f"speed of transformers with {peer} attention, {expected:.2f}x expected from the matrix "
        f"products; loss {loss:.6f} in both"
    )
    for name, values in seconds.items():
        part = quartiles([1e3 * value for value in values])
        print(f"  {name:14s} {part[1]:8.1f} ms (quartiles {part[0]:.1f}-{part[2]:.1f})")
    return {
        "form": form,
        "ratio": median,
        "ratio_quartiles": [low, high],
        "expected_from_flops": expected,
        "peer_attention": peer,
        "median_ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "loss_float32": loss,
        "ours": asdict(ours),
        "transformers": asdict(theirs),
    }


def main() -> None:
    """Compare both forms and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20, help="timed steps of each")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each before them")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--pictures", type=int, default=16, help="pictures of a step")
    parser.add_argument(
        "--compile", action="store_true", help="also our step with compiled bodies (run.compile)"
    )
    parser.add_argument("--rows", type=int, default=1, help="packed rows of our step")
    parser.add_argument("--vocab-size", type=int, default=512, help="tokens of the vocabulary")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    document = {
        "benchmark": "train_step",
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "pictures": arguments.pictures,
        "torch": torch.__version__,
        "results": [compare(form, arguments) for form in FORMS],
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
