"""The engine with a packed model: the same answers, and new weights."""

from __future__ import annotations

import pytest
import torch
from tests.engine.small_prompts import engine_for, ids_of, requests
from tests.model.bodies import BODIES, body_model

from cascadevl.engine.engine import Engine
from cascadevl.engine.packed_weights import pack
from cascadevl.engine.requests import EngineConfig

CONFIG = EngineConfig(num_pages=200, page_tokens=4, max_step_tokens=64)


@pytest.mark.parametrize("body", BODIES)
def test_packed_models_give_the_same_greedy_tokens(body: str):
    model = body_model(body)
    expected = ids_of(engine_for(model).generate(requests()))
    assert ids_of(Engine(pack(model, "packed"), config=CONFIG).generate(requests())) == expected


def test_int8_keeps_most_tokens_even_of_a_model_that_has_learned_nothing():
    model = body_model("qwen3")
    plain = ids_of(engine_for(model).generate(requests()))
    int8 = ids_of(Engine(pack(model, "int8"), config=CONFIG).generate(requests()))
    pairs = [
        (one, other)
        for answer, same in zip(plain, int8, strict=True)
        for one, other in zip(answer[0], same[0], strict=True)
    ]
    assert len(pairs) == 48
    assert sum(one == other for one, other in pairs) >= 30  # by chance less than one


def test_new_weights_reach_a_packed_model_and_its_caches():
    model, other = body_model("qwen2"), body_model("qwen2", seed=1)
    before = ids_of(engine_for(model).generate(requests()))
    after = ids_of(engine_for(other).generate(requests()))
    assert before != after
    engine = Engine(pack(model, "packed"), config=CONFIG)
    assert ids_of(engine.generate(requests())) == before
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.copy_(theirs)  # an optimiser's step
    engine.load(model.state_dict())
    assert ids_of(engine.generate(requests())) == after
