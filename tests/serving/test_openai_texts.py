"""Texts that are continued, as OpenAI's client asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.serving.small_server import GREEDY, Served, serving, small_pair

from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import EngineConfig, Request, TextIds
from cascadevl.engine.sampling import SamplingParams

MODEL, PROCESSOR = small_pair()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(MODEL, PROCESSOR) as server:
        yield server


def test_texts_are_continued(served: Served):
    prompts = ["the quick brown", "one two"]
    reply = served.client.completions.create(prompt=prompts, n=2, seed=3, logprobs=1, **GREEDY)
    engine = Engine(MODEL, PROCESSOR, EngineConfig(num_pages=300, page_tokens=4))
    sampling = SamplingParams(max_tokens=12, ignore_eos=True, seed=3, logprobs=1)
    asked = [tuple(PROCESSOR.tokenizer(text).input_ids) for text in prompts]
    answers = engine.generate(
        Request(prompt=(TextIds(ids),), sampling=sampling, num_samples=2) for ids in asked
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    said = [answer.text for each in answers for answer in each]
    assert [choice.text for choice in reply.choices] == said
    assert reply.choices[0].logprobs is not None
    assert len(reply.choices[0].logprobs.token_logprobs or ()) == 12
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == sum(map(len, asked))
    by_ids = served.client.completions.create(
        prompt=[list(ids) for ids in asked], n=2, seed=3, stream=True, **GREEDY
    )
    texts = ["", "", "", ""]
    for event in by_ids:
        for choice in event.choices:
            texts[choice.index] += choice.text
    assert texts == said


def test_the_best_of_several_continuations(served: Served):
    wishes = GREEDY | {"temperature": 1.5, "seed": 1}
    both = served.client.completions.create(prompt="one", n=6, logprobs=0, **wishes)

    def mean(choice: Any) -> float:
        values = choice.logprobs.token_logprobs
        return sum(values) / len(values)

    ranked = sorted(both.choices, key=mean, reverse=True)
    best = served.client.completions.create(prompt="one", n=2, best_of=6, **wishes)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert best.choices[0].logprobs is None
    assert best.usage is not None
    assert best.usage.completion_tokens == 72
