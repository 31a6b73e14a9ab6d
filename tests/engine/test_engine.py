"""The engine against transformers' generate and against itself: what must not change an answer."""

from __future__ import annotations

import pytest
from tests.engine.small_prompts import (
    by_transformers,
    engine_for,
    ids_of,
    prompts,
    requests,
)
from tests.model.bodies import BODIES, body_model


@pytest.mark.parametrize("body", BODIES)
def test_greedy_tokens_are_those_of_transformers_generate(body: str) -> None:
    model = body_model(body, increment=0.25)
    expected = [[by_transformers(model, prompt, 8)] for prompt in prompts()]
    engine = engine_for(model)
    assert ids_of(engine.generate(requests())) == expected
    assert ids_of(engine.generate(requests())) == expected  # from the cache
    assert ids_of(engine_for(model, max_step_tokens=7).generate(requests())) == expected
    tiny = engine_for(model, num_pages=15, max_running=3, max_step_tokens=16)
    assert ids_of(tiny.generate(requests())) == expected
    fixed = engine_for(model, batch_invariant=True)
    assert ids_of(fixed.generate(requests())) == expected
