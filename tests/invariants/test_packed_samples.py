"""Packed = alone, from records to gradients: everything a row can hold, for every text body.

One packed row holds a text, a picture of several tiles, several pictures, a video, a record with
branches and a document, with increments drawn for each picture. The row is made as in training
(`ExampleBuilder`, `collate`). It is held against its samples alone, each branch as a conversation
of its own, and against transformers' own attention with a mask written out by loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import PIL.Image
import pytest
import torch
from tests.data.conftest import TEXTS, picture
from tests.model.bodies import BODIES, body_model
from tests.reference import attention_by_hand
from torch import Tensor
from transformers import AutoModel

from cascadevl.data.collate import collate
from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.tiling import TilingConfig
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.types import NO_PARENT, Batch, Example, ImageRef, Message, Record, VideoRef

TOKENS_PER_TILE = 4
TOKENIZER = build_tokenizer(TEXTS, 400)
BUILDER = ExampleBuilder(
    TOKENIZER,
    ExampleConfig(
        system="",
        tiling=TilingConfig(tile_px=28, max_tiles=4),
        increment="random",
        min_frames=4,
        max_frames=4,
        seed=2,
    ),
    TOKENS_PER_TILE,
)


def user(*parts: str | ImageRef | VideoRef) -> Message:
    return Message.of("user", *parts)


def said(text: str) -> Message:
    return Message.of("assistant", text)


def shot(width: int, height: int, seed: int) -> ImageRef:
    return ImageRef(picture(width, height, seed))


def record(name: str, *messages: Message, branches: tuple[tuple[Message, ...], ...] = ()) -> Record:
    return Record(source=name, record_id=name, messages=messages, branches=branches)


@dataclass(frozen=True)
class Row:
    """The examples of one packed row, and the same as conversations without branches."""

    packed: list[Example]
    alone: list[Example]


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> Row:
    frames = tmp_path_factory.mktemp("frames")
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(frames / f"{number}.png")
    shared = user(shot(60, 28, 5), "\nWhat is there?")
    questions = (
        (said("A dog."), user("And the number?"), said("1407.")),
        (said("There are 3 red squares."),),
    )
    records = [
        record("text", user("How many?"), said("3."), user("Add 12."), said("It is 42.")),
        record("picture", user(shot(60, 28, 0), "\nHow many red squares?"), said("There are 3.")),
        record(
            "pictures",
            user("Image-1: ", shot(30, 60, 1), "\nImage-2: ", shot(28, 28, 2), "\nSame?"),
            said("No."),
            user(shot(90, 28, 3), "\nAnd this?"),
            said("A small green dog."),
        ),
        record("video", user(VideoRef(source=frames), "\nWhat moves?"), said("A dog.")),
        record("branches", shared, branches=questions),
        record("document", Message.of("pretrain", "A dog ", shot(28, 28, 4), " is small.")),
    ]
    packed = [BUILDER(each) for each in records]
    branches = packed[4]
    alone = [each for each in packed if each is not branches]
    for number, turns in enumerate(questions):
        whole = BUILDER(record(f"branches#{number + 1}", shared, *turns))
        alone.insert(4 + number, replace(whole, increments=branches.increments))
    return Row(packed, alone)


def collated(rows: Sequence[Sequence[Example]], *, ceil: bool = False) -> Batch:
    return collate(
        rows,
        image_token_id=BUILDER.image_token_id,
        pad_token_id=0,
        tokens_per_tile=TOKENS_PER_TILE,
        averaging="square",
        ceil_after_image=ceil,
    )


def scored(
    model: CascadeVLForConditionalGeneration, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of every target, and the gradients of the weighted loss."""
    chunks = []

    def head(logits: Tensor, place: slice) -> Tensor:
        chunks.append(logits.detach().float())
        logprobs = logits.float().log_softmax(-1)
        return -logprobs.gather(-1, batch.target_ids[place, None]).squeeze(-1)

    model.zero_grad()
    (model(batch=batch, head_fn=head) * batch.target_weights).sum().backward()
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    return torch.cat(chunks), grads


def model_of(name: str) -> CascadeVLForConditionalGeneration:
    return body_model(name, vocab_size=len(TOKENIZER), image_token_id=BUILDER.image_token_id)


def test_the_row_holds_everything_that_is_to_be_shown(row: Row) -> None:
    increments = [each.increments for each in row.packed]
    assert [len(each) for each in increments] == [0, 1, 3, 4, 1, 1]
    assert len({value for each in increments for value in each}) >= 4
    assert len(set(increments[2])) > 1
    assert len(set(increments[3])) == 1  # the frames of one video
    assert row.packed[1].tiles_per_image == (3,)
    assert row.packed[4].parents == (NO_PARENT, 0, 0)
    positions = collated([row.packed]).position_ids
    assert (positions.frac() != 0).any()
    assert positions.max() < collated([row.packed]).input_ids.shape[1] / 3  # it restarts


@pytest.mark.parametrize("ceil", [False, True], ids=["as printed", "ceil"])
@pytest.mark.parametrize("body", BODIES)
def test_logits_and_gradients_of_a_packed_row_are_those_of_its_samples(
    row: Row, body: str, ceil: bool
) -> None:
    model = model_of(body)
    logits, grads = scored(model, collated([row.packed], ceil=ceil))
    alone = [scored(model, collated([[each]], ceil=ceil)) for each in row.alone]
    torch.testing.assert_close(logits, torch.cat([each for each, _ in alone]), rtol=0, atol=1e-5)
    for name, together in grads.items():
        apart = sum(each[name] for _, each in alone)
        torch.testing.assert_close(
            together, apart, rtol=1e-5, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}"
        )


@pytest.mark.parametrize("body", BODIES)
def test_a_packed_row_equals_transformers_with_a_mask_by_hand(row: Row, body: str) -> None:
    model = model_of(body)
    batch = collated([row.packed])
    logits, _ = scored(model, batch)
    text = model.config.text_config
    plain = AutoModel.from_config(text, attn_implementation="eager").eval()
    plain.load_state_dict(model.model.language_model.state_dict())
    windows = {"full_attention": None, "sliding_attention": getattr(text, "sliding_window", None)}
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    masks = {kind: mask_by_hand(batch, windows[kind]) for kind in dict.fromkeys(kinds)}
    takes_one = body in ("qwen3_moe", "internlm2", "internlm3")
    with torch.no_grad():
        visual = model.model.encode(batch.tiles)
        embeds = model.model.embed(batch.input_ids, batch.visual_index, visual)
        hidden = plain(
            inputs_embeds=embeds,
            attention_mask=masks["full_attention"] if takes_one else masks,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        expected = model.lm_head(hidden.flatten(0, 1)[batch.target_index])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def mask_by_hand(batch: Batch, window: int | None) -> Tensor:
    segments, parents = batch.segments[0].tolist(), batch.parents[0].tolist()
    mask = torch.full((1, 1, len(segments), len(segments)), torch.finfo(torch.float32).min)
    for token in range(len(segments)):
        seen = attention_by_hand.seen_by(token, segments, parents, window)
        mask[0, 0, token, seen] = 0.0
    return mask


def test_the_increment_of_one_sample_changes_that_sample_alone(row: Row) -> None:
    model = model_of("qwen3")
    changed = list(row.packed)
    changed[2] = replace(changed[2], increments=(1.0, 1 / 256, 1 / 4))
    batches = [collated([row.packed]), collated([changed])]
    first, second = (scored(model, batch)[0] for batch in batches)
    of_it = batches[0].target_samples == 2
    assert torch.equal(first[~of_it], second[~of_it])
    assert (first[of_it] - second[of_it]).abs().amax() > 1e-4
