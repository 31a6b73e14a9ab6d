"""A real model as a responder: its answers, in order, as if each were asked alone."""

from __future__ import annotations

import pytest
import torch
from tests.eval.small_suite import SEED, suite

from cascadevl.data.conversation import IMAGE_CONTEXT
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import TilingConfig
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.engine.conversation import answer
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import run_suite
from cascadevl.eval.suite import draw_row
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.presets import nano_config
from cascadevl.tasks.base import to_prompt

Parts = tuple[CascadeVLForConditionalGeneration, CascadeVLProcessor]


@pytest.fixture(scope="module")
def parts() -> Parts:
    """Tiny widths, and weights large enough that every picture gets an answer of its own."""
    rows = [draw_row(row, split="train", seed=0) for row in suite(20)]
    texts = [f"{a.question.prompt}\n{a.question.response()}" for row in rows for a in row]
    tokenizer = build_tokenizer(texts, 400)
    config = nano_config(
        len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32},
    )
    model = CascadeVLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.8)
    processor = CascadeVLProcessor(
        tokenizer,
        template=config.template,
        system_message=config.system_message,
        tiling=TilingConfig(tile_px=config.tile_px, max_tiles=1),
        tokens_per_tile=config.tokens_per_tile,
    )
    return model.eval(), processor


def test_answers_are_those_of_each_question_asked_alone(parts: Parts) -> None:
    responder = ModelResponder(model=parts[0], processor=parts[1], max_new_tokens=4)
    rows = [draw_row(row, split="test", seed=SEED) for row in suite(3)]
    conversations = [to_prompt(each.scene, each.question) for row in rows for each in row]
    together = responder(conversations)
    assert together == [responder([conversation])[0] for conversation in conversations]
    assert len(set(together)) > len(together) // 2  # else any order would pass


def test_a_model_is_scored(parts: Parts) -> None:
    """Random weights know nothing, and the suite says so."""
    responder = ModelResponder(model=parts[0], processor=parts[1], max_new_tokens=3)
    scores = run_suite(responder, suite(3), seed=SEED)
    for score in scores:
        prompts = [to_prompt(each.asked.scene, each.asked.question) for each in score.answered]
        said = answer(parts[0], parts[1], prompts, max_new_tokens=3)
        assert [each.response for each in score.answered] == [each.text for each in said]
        assert max(len(each.token_ids) for each in said) == 3
        right = sum(each.asked.question.check(each.response) for each in score.answered)
        assert score.estimate.value == right / 3


def test_sampled_answers_depend_on_the_seed_alone(parts: Parts) -> None:
    model, processor = parts
    rows = draw_row(suite(6)[3], split="test", seed=SEED)
    conversations = [to_prompt(each.scene, each.question) for each in rows]
    first, again, other = (
        ModelResponder(
            model=model, processor=processor, max_new_tokens=3, temperature=2.0, seed=seed
        )(conversations)
        for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other


def test_the_model_is_left_in_the_mode_it_was_in(parts: Parts) -> None:
    model, processor = parts
    conversation = to_prompt(
        *(lambda a: (a.scene, a.question))(draw_row(suite(1)[1], split="test", seed=0)[0])
    )
    model.train()
    try:
        ModelResponder(model=model, processor=processor, max_new_tokens=1)([conversation])
        assert model.training
    finally:
        model.eval()
