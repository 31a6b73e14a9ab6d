"""The data path as training uses it: drawn tasks, the real builder, rows, batches, a resume.

Parts are tested one by one elsewhere. Here a batch is laid out by hand from what a task draws:
every branch written out as a conversation of its own, rows by lists, pictures by three numbers.
"""

from __future__ import annotations

import json
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.reference import batch_by_hand, conversation_by_hand
from transformers import PreTrainedTokenizerFast

from cascadevl.data.conversation import IMAGE_CONTEXT
from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.mixture import Mixture, WeightedSource
from cascadevl.data.packing import FixedRows, Packer
from cascadevl.data.prefetch import Prefetcher
from cascadevl.data.stream import BatchStream, CollateConfig, StreamConfig
from cascadevl.data.tiling import TilingConfig
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.losses.next_token import Averaging
from cascadevl.tasks import TASKS
from cascadevl.tasks.base import TaskSource
from cascadevl.types import Batch, ImageRef, Record

PX, PER_TILE, SEED = 56, 4, 5
POWERS: dict[Averaging, float] = {"token": 0.0, "square": 0.5, "sample": 1.0}


def mixture() -> Mixture:
    """Pictures with questions, with a description before them, and text alone."""
    sources = [
        TaskSource(task=TASKS["handwriting"](px=PX), length=50, stage="pretrain"),
        TaskSource(task=TASKS["shapes"](px=PX, num_questions=4), length=9, stage="sft"),
        TaskSource(task=TASKS["easy_vqa"](px=PX, num_questions=5), length=50, stage="sft"),
        TaskSource(task=TASKS["text"](), length=50, stage="sft"),
    ]
    return Mixture([WeightedSource(source=s, weight=1.0) for s in sources], seed=SEED)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    records = [mixture().record(mixture().draw(number)) for number in range(60)]
    turns = [turn for r in records for turns in (r.messages, *r.branches) for turn in turns]
    return build_tokenizer([turn.text for turn in turns], 420)


def make_stream(
    tokenizer: PreTrainedTokenizerFast,
    rows: Any,
    *,
    averaging: Averaging = "square",
    num_rows: int = 1,
    **example: Any,
) -> BatchStream:
    values: dict[str, Any] = {"system": "", "increment": 1.0, "jpeg": False} | example
    config = ExampleConfig(
        template="internvl2_5",
        tiling=TilingConfig(tile_px=PX, max_tiles=1),
        max_tokens=600,
        seed=SEED,
        **values,
    )
    return BatchStream(
        mixture(),
        ExampleBuilder(tokenizer, config, PER_TILE),
        rows,
        CollateConfig(
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
            pad_token_id=tokenizer.pad_token_id,
            tokens_per_tile=PER_TILE,
            averaging=averaging,
        ),
        StreamConfig(rows_per_batch=num_rows),
    )


def by_hand(tokenizer: Any, record: Record, system: str, increment: float) -> Any:
    """What the example of a record must be: every branch tokenised as a conversation alone."""

    def turns(messages: Any) -> list[tuple[str, str]]:
        text = [
            (m.role, "".join("<image>" if isinstance(p, ImageRef) else p for p in m.parts))
            for m in messages
        ]
        if len(text) == 3:  # a branch goes on with the open turn
            text[:2] = [("user", text[0][1] + text[1][1])]
        return text

    has_image = bool(record.branches)
    if has_image:
        every = [turns((*record.messages, *branch)) for branch in record.branches]
        opening = conversation_by_hand.qwen(tokenizer, turns(record.messages), system)[0]
        end = tokenizer("<|im_end|>\n", add_special_tokens=False).input_ids
        num_shared = len(opening) - len(end)
    else:
        every, num_shared = [turns(record.messages)], 0
    ids: list[int] = []
    trained: list[bool] = []
    segments: list[int] = []
    for number, conversation in enumerate(every):
        all_ids, all_trained = conversation_by_hand.qwen(tokenizer, conversation, system)
        if has_image and number == 0:
            ids, trained = all_ids[:num_shared], all_trained[:num_shared]
            segments = [0] * num_shared
        assert all_ids[:num_shared] == ids[:num_shared]
        ids += all_ids[num_shared:]
        trained += all_trained[num_shared:]
        segments += [number + has_image] * (len(all_ids) - num_shared)
    return SimpleNamespace(
        source=record.source,
        input_ids=np.array(ids),
        trained=np.array(trained),
        segments=np.array(segments),
        parents=(-1, *[0] * len(every)) if has_image else (-1,),
        tiles_per_image=(1,) * has_image,
        increments=(increment,) * has_image,
    )


def assert_is(batch: Batch, wanted: batch_by_hand.Lists, pad: int) -> None:
    width = max(len(row) for row in wanted.rows)
    assert batch.input_ids.shape == (len(wanted.rows), width)
    for number, row in enumerate(wanted.rows):
        filling = width - len(row)
        assert batch.input_ids[number].tolist() == [t.id for t in row] + [pad] * filling
        assert batch.position_ids[number, : len(row)].tolist() == [t.position for t in row]
        assert batch.segments[number].tolist() == [t.segment for t in row] + [-1] * filling
        assert batch.parents[number, : len(row)].tolist() == [t.parent for t in row]
    assert batch.visual_index.tolist() == wanted.visual_index
    assert batch.sources == tuple(wanted.sources)
    found = zip(
        batch.target_index.tolist(),
        batch.target_ids.tolist(),
        batch.target_weights.tolist(),
        batch.target_samples.tolist(),
        strict=True,
    )
    assert [(index, id_, sample) for index, id_, _, sample in found] == [
        (index, id_, sample) for index, id_, _, sample in wanted.targets
    ]
    weights = [weight for _, _, weight, _ in wanted.targets]
    assert batch.target_weights.tolist() == pytest.approx(weights, rel=1e-6)


@pytest.mark.parametrize("averaging", list(POWERS))
@pytest.mark.parametrize(("system", "increment"), [("", 1.0), ("Look.", 0.25)])
def test_batches_equal_those_laid_out_by_hand(
    tokenizer: PreTrainedTokenizerFast, averaging: Averaging, system: str, increment: float
) -> None:
    stream = make_stream(
        tokenizer,
        FixedRows(3),
        averaging=averaging,
        num_rows=2,
        system=system,
        increment=increment,
    )
    drawn = mixture()
    records = [drawn.record(drawn.draw(number)) for number in range(12)]
    assert {record.dataset for record in records} == {"handwriting", "shapes", "easy_vqa", "text"}
    for first, batch in zip((0, 6), stream, strict=False):
        six = records[first : first + 6]
        examples = [by_hand(tokenizer, record, system, increment) for record in six]
        wanted = batch_by_hand.batch(
            [examples[:3], examples[3:]],
            image_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
            per_tile=PER_TILE,
            power=POWERS[averaging],
        )
        assert_is(batch, wanted, tokenizer.pad_token_id)
        assert_pictures(batch, six)


def assert_pictures(batch: Batch, records: list[Record]) -> None:
    """One tile of the very pixels drawn: the picture has the tile's size."""
    parts = [part for record in records for part in record.messages[0].parts]
    pictures = [np.asarray(part.source) for part in parts if isinstance(part, ImageRef)]
    assert batch.tiles is not None
    assert np.array_equal(batch.tiles.numpy(), np.stack(pictures))
    assert batch.tokens_per_tile.tolist() == [PER_TILE] * len(pictures)


def test_pictures_are_degraded_in_training_and_answers_are_not_touched(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    clean, degraded = (
        next(make_stream(tokenizer, FixedRows(6), jpeg=jpeg)) for jpeg in (False, True)
    )
    assert torch.equal(clean.input_ids, degraded.input_ids)
    assert clean.tiles is not None
    assert degraded.tiles is not None
    difference = (clean.tiles.float() - degraded.tiles.float()).abs()
    assert (difference.mean(dim=(1, 2, 3)) > 0).all()
    assert difference.mean() < 12  # of 255: a JPEG of the same picture


def assert_same(one: Batch, two: Batch) -> None:
    for name in one.__dataclass_fields__:
        left, right = getattr(one, name), getattr(two, name)
        if isinstance(left, torch.Tensor):
            assert torch.equal(left, right), name
        else:
            assert left == right, name


@pytest.mark.parametrize("packing", ["fill", "count"])
@pytest.mark.parametrize("stop", [1, 6])
def test_a_resume_is_exact_with_all_that_is_drawn(
    tokenizer: PreTrainedTokenizerFast, packing: str, stop: int
) -> None:
    """Order, second epochs, JPEG qualities and increments go on as if nothing had happened."""

    def fresh() -> BatchStream:
        rows = Packer(500, 4, 3) if packing == "fill" else FixedRows(4)
        return make_stream(tokenizer, rows, num_rows=2, jpeg=True, increment="random")

    whole = fresh()
    for _ in range(stop):
        next(whole)
    resumed = fresh()
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    increments: set[float] = set()
    for one, two in zip(islice(whole, 6), islice(resumed, 6), strict=True):
        assert_same(one, two)
        increments |= set(one.position_ids.frac().flatten().tolist())
    assert len(increments) > 3  # fractional positions: increments really were drawn
    assert whole.state_dict() == resumed.state_dict()
    assert whole.num_draws > 4 * 9  # shapes, a quarter of the draws, came a second time
    assert whole.skipped == {}


def test_batches_made_ahead_are_the_same_and_resume_where_they_were_taken(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    plain = make_stream(tokenizer, FixedRows(3), jpeg=True)
    with Prefetcher(make_stream(tokenizer, FixedRows(3), jpeg=True), 2) as ahead:
        for one, two in zip(islice(plain, 3), islice(ahead, 3), strict=True):
            assert_same(one, two)
        state = json.loads(json.dumps(ahead.state_dict()))
    resumed = make_stream(tokenizer, FixedRows(3), jpeg=True)
    resumed.load_state_dict(state)
    assert_same(next(plain), next(resumed))
