"""Two thousand requests of every kind in a pool of few pages: none lost, none changed, no leak."""

from __future__ import annotations

import numpy as np
import pytest
from tests.engine.small_prompts import engine_for, text, tiles
from tests.model.small import small_model

from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import Request, StepResult, TextIds
from cascadevl.engine.sampling import SamplingParams

NUM_REQUESTS = 2000
NUM_PAGES = 24


def mixed_requests() -> list[Request]:
    rng = np.random.default_rng(0)
    requests = []
    for number in range(NUM_REQUESTS):
        kind = int(rng.integers(4))
        parts = (text(int(rng.integers(30)), int(rng.integers(1, 20))),)
        if kind == 1:  # one of few pictures, asked about again and again
            parts = (TextIds((3,)), tiles(int(rng.integers(6)), int(rng.integers(1, 4))), *parts)
        if kind == 2:  # many begin alike
            parts = (text(99, 13), *parts)
        sampling = SamplingParams(
            temperature=float(rng.choice([0.0, 0.7, 1.3])),
            top_p=float(rng.choice([1.0, 0.9])),
            repetition_penalty=float(rng.choice([1.0, 1.0, 1.2])),
            seed=number,
            max_tokens=int(rng.integers(1, 9)),
            stop_token_ids=(50, 51, 52),
            logprobs=None if rng.random() < 0.8 else 1,
        )
        samples = int(rng.choice([1, 1, 2, 4]))
        requests.append(
            Request(
                prompt=parts,
                sampling=sampling,
                num_samples=samples,
                increments=float(rng.choice([1.0, 0.25])),
                stream=bool(rng.random() < 0.3),
            )
        )
    return requests


class Listener:
    """Notes what an engine reports."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], tuple[tuple[int, ...], str]] = {}
        self.streamed: dict[tuple[int, int], list[int]] = {}

    def hear(self, result: StepResult) -> None:
        for each in result.completions:
            order = each.request_id, each.sample
            assert order not in self.found, "an answer was given twice"
            self.found[order] = each.token_ids, each.finish_reason
        for token in result.tokens:
            ids = self.streamed.setdefault((token.request_id, token.sample), [])
            if token.token_id is not None:
                ids.append(token.token_id)


def run_with_cancels(engine: Engine, requests: list[Request]) -> tuple[Listener, set[int]]:
    rng = np.random.default_rng(1)
    listener, cancelled, added = Listener(), set(), 0
    while added < len(requests) or not engine.is_idle:
        while added < len(requests) and engine.num_waiting < 20:
            assert engine.add(requests[added]) == added
            added += 1
        if rng.random() < 0.02:
            number = int(rng.integers(max(0, added - 25), added))
            cancelled.add(number)
            engine.cancel(number)
        listener.hear(engine.step())
        engine.check()
    return listener, cancelled


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_requests_with_cancels_in_few_pages() -> None:
    model, requests = small_model(), mixed_requests()
    roomy = engine_for(model, num_pages=2000, max_step_tokens=512)
    expected = [[(c.token_ids, c.finish_reason) for c in each] for each in roomy.generate(requests)]
    engine = engine_for(
        model, num_pages=NUM_PAGES, max_running=12, max_step_tokens=24, feature_bytes=2000
    )
    listener, cancelled = run_with_cancels(engine, requests)
    called_off = 0
    for number, request in enumerate(requests):
        for sample in range(request.num_samples):
            ids, reason = listener.found.pop((number, sample))
            if reason == "cancelled":
                assert number in cancelled
                assert ids == expected[number][sample][0][: len(ids)]
                called_off += 1
            else:
                assert (ids, reason) == expected[number][sample]
            if request.stream:
                heard = listener.streamed.get((number, sample), [])
                assert tuple(heard[: len(ids)]) == ids
    assert not listener.found
    assert called_off > 20
    assert engine.stats().preemptions > 100
    assert engine.stats().free_pages == NUM_PAGES
