"""Packed = alone: outputs and gradients, with images, mixed increments, windows and sinks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.model.packed import head, pack, sample
from tests.model.small import IMAGE, TOKENS_PER_TILE, VOCAB, small_config, small_model
from torch import Tensor
from transformers import GptOssConfig

from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.types import Batch


def gpt_oss() -> CascadeVLForConditionalGeneration:
    text = GptOssConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=6,
        pad_token_id=1,
    )
    config = CascadeVLConfig(
        vision_config=small_config().vision_config,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=TOKENS_PER_TILE,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = CascadeVLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15)
    return model.eval()


MODELS = {
    "full": small_model,
    "windows": lambda: small_model(text={"use_sliding_window": True, "sliding_window": 5}),
    "gpt_oss": gpt_oss,
}


def scored(model: CascadeVLForConditionalGeneration, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Every target's loss, and the gradient of the weighted sum."""
    model.zero_grad()
    nll = model(batch=batch, head_fn=head(batch))
    (nll * batch.target_weights).sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return nll.detach(), [grad.clone() for grad in grads]


SAMPLES = [
    sample([1], [0.25], seed=1),
    sample([2, 1], [1.0, 1 / 256], seed=2),
    sample([], seed=3),
    sample([3], [0.5], seed=4),
]


@pytest.mark.parametrize("kind", MODELS)
def test_packed_equals_alone_with_its_gradients(kind: str) -> None:
    model = MODELS[kind]()
    packed = pack([[SAMPLES[2], SAMPLES[0], SAMPLES[3]], [SAMPLES[1]]])
    nll, grads = scored(model, packed)
    alone = [scored(model, pack([[SAMPLES[n]]])) for n in (2, 0, 3, 1)]
    torch.testing.assert_close(nll, torch.cat([each for each, _ in alone]), rtol=0, atol=1e-5)
    for together, *apart in zip(grads, *[each for _, each in alone], strict=True):
        torch.testing.assert_close(together, sum(apart), rtol=1e-4, atol=1e-5)


def test_a_packed_sample_equals_the_plain_call() -> None:
    model = small_model()
    for each in SAMPLES:
        batch = pack([[each]])
        logits = model(
            input_ids=each.input_ids[None],
            pixel_values=each.pixel_values,
            position_ids=each.position_ids[None],
        ).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, each.input_ids[1:], reduction="none")
        got = model(batch=batch, head_fn=head(batch))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_shared_prompt_equals_separate_samples_with_its_gradients(kind: str) -> None:
    """One picture and its question's beginning, two continuations: a tree of three segments."""
    model = MODELS[kind]()
    whole = [sample([2], [0.25], seed=5), sample([2], [0.25], seed=5)]
    shared = int((whole[0].input_ids == IMAGE).nonzero().max()) + 1
    other = torch.tensor([40, 41, 42, 43])
    ids = torch.cat([whole[0].input_ids[:shared], other])
    after = whole[0].position_ids[shared - 1] + torch.arange(1, 5)
    whole[1] = replace(
        whole[1],
        input_ids=ids,
        position_ids=torch.cat([whole[0].position_ids[:shared], after]),
    )
    separate = pack([whole])
    is_branch = torch.cat([torch.arange(len(w.input_ids) - 1) >= shared - 1 for w in whole])
    separate = replace(separate, target_weights=separate.target_weights * is_branch)
    expected, expected_grads = scored(model, separate)

    rest = whole[0].input_ids[shared:]
    lengths = [shared, len(rest), len(other)]
    starts = [0, shared, shared + len(rest)]
    tree = replace(
        separate,
        input_ids=torch.cat([ids[:shared], rest, other])[None],
        position_ids=torch.cat([whole[0].position_ids, after])[None],
        segments=torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None],
        parents=torch.repeat_interleave(torch.tensor([-1, 0, 0]), torch.tensor(lengths))[None],
        tiles=whole[0].tiles,
        tokens_per_tile=separate.tokens_per_tile[:2],
        visual_index=(ids == IMAGE).nonzero().squeeze(1),
        target_index=torch.tensor(
            [
                *(shared - 1, *range(starts[1], starts[1] + len(rest) - 1)),
                *(shared - 1, *range(starts[2], starts[2] + len(other) - 1)),
            ]
        ),
        target_ids=torch.cat([rest, other]),
        target_weights=separate.target_weights[is_branch],
        target_samples=separate.target_samples[is_branch],
    )
    got, grads = scored(model, tree)
    torch.testing.assert_close(got, expected[is_branch], rtol=0, atol=1e-5)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_one_sample_does_not_feel_another() -> None:
    model = small_model()
    first, second = SAMPLES[0], SAMPLES[2]
    changed = replace(first, input_ids=torch.where(first.input_ids == IMAGE, IMAGE, 50))
    outcome = []
    for each in (first, changed):
        batch = pack([[each, second]])
        nll = model(batch=batch, head_fn=head(batch)).detach()
        outcome.append(nll[batch.target_samples == 1])
    assert torch.equal(*outcome)


def test_how_samples_are_spread_over_rows_does_not_matter() -> None:
    model = small_model()
    one_row = scored(model, pack([SAMPLES]))
    rows = scored(model, pack([[each] for each in SAMPLES]))
    torch.testing.assert_close(one_row[0], rows[0], rtol=0, atol=1e-5)
    for mine, theirs in zip(one_row[1], rows[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
