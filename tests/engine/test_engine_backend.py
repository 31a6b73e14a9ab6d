"""Our engine behind the protocol: the answers of the reference, whatever comes, fails or stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.small_backend import checkpoint, requests_of
from tests.engine.test_transformers_backend import answers, check_stream, collected

from cascadevl.engine.backends import Backend, generate
from cascadevl.engine.engine import Engine
from cascadevl.engine.engine_backend import EngineBackend
from cascadevl.engine.requests import EngineConfig
from cascadevl.engine.transformers_backend import TransformersBackend
from cascadevl.errors import RequestError
from cascadevl.model.loading import load


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(checkpoint(tmp_path_factory.mktemp("checkpoint") / "github"))


def backend_of(opened: Any, *, max_waiting: int = 64, **limits: Any) -> EngineBackend:
    engine = Engine(*opened, EngineConfig(**{"num_pages": 100, **limits}))
    return EngineBackend(engine=engine, max_waiting=max_waiting)


@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"stop_token_ids": tuple(range(100, 130))},
        {"stop": ("e", "o")},
        {"repetition_penalty": 1.3, "num_samples": 2},
        {"ignore_eos": False, "min_tokens": 4},
    ],
    ids=lambda wishes: ", ".join(wishes) or "greedy",
)
def test_greedy_answers_are_those_of_the_reference(opened: Any, wishes: dict[str, Any]) -> None:
    model, processor = opened
    requests = requests_of(processor, **wishes)
    reference = TransformersBackend(model=model, processor=processor)
    got, expected = generate(backend_of(opened), requests), generate(reference, requests)
    for mine, theirs in zip(got, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one.token_ids == other.token_ids
            assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
            assert one.sample == other.sample
            assert one.usage.completion_tokens == other.usage.completion_tokens
            assert one.usage.visual_tokens == other.usage.visual_tokens


def test_it_is_a_backend_that_says_what_it_can_do(opened: Any) -> None:
    backend = backend_of(opened)
    assert isinstance(backend, Backend)
    assert backend.capabilities.increments
    assert backend.capabilities.weight_refresh


def test_what_can_never_be_answered_is_its_own_outcome(opened: Any) -> None:
    _, processor = opened
    first, second, third = requests_of(processor)
    large = requests_of(processor, max_tokens=300)[0]
    backend = backend_of(opened, num_pages=20)
    outcomes = dict(backend.answer([first, large, second, third]))
    assert isinstance(outcomes[1], RequestError)
    assert all(len(outcomes[number]) == 1 for number in (0, 2, 3))
    assert [outcomes[0][0].token_ids, outcomes[2][0].token_ids] == answers(
        backend_of(opened), [first, second]
    )


def test_an_answer_follows_a_schema(opened: Any) -> None:
    schema = '{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}'
    wishes = {"json_schema": schema, "ignore_eos": False, "max_tokens": 100}
    ((answer,),) = generate(backend_of(opened), requests_of(opened[1], **wishes)[:1])
    assert isinstance(json.loads(answer.text)["a"], bool)
    broken = requests_of(opened[1], json_schema='{"type": "nothing"}', ignore_eos=False)[:1]
    outcomes = dict(backend_of(opened).answer(broken))
    assert isinstance(outcomes[0], RequestError)


def test_requests_are_taken_as_there_is_room(opened: Any) -> None:
    _, processor = opened
    taken = 0

    def asked() -> Any:
        nonlocal taken
        for request in requests_of(processor) * 10:
            taken += 1
            yield request

    outcomes = backend_of(opened, max_waiting=2, max_running=3).answer(asked())
    next(outcomes)
    assert taken <= 2 + 3 + 2
    assert len(list(outcomes)) == 29


def test_leaving_the_answers_calls_the_rest_off(opened: Any) -> None:
    _, processor = opened
    backend = backend_of(opened)
    outcomes = backend.answer(requests_of(processor, max_tokens=30) + requests_of(processor))
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    backend.engine.step()
    stats = backend.engine.stats()
    assert (stats.waiting, stats.running, stats.free_pages) == (0, 0, stats.pages)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_the_answer_piece_by_piece(opened: Any, temperature: float) -> None:
    backend = backend_of(opened)
    request = requests_of(opened[1], num_samples=2, temperature=temperature, seed=3)[2]
    check_stream(collected(backend, request), generate(backend, [request])[0])


def test_an_answer_that_is_no_number_is_its_own_outcome(tmp_path: Path) -> None:
    model, processor = load(checkpoint(tmp_path / "github"))
    first, second = requests_of(processor)[:2]
    only_in_first = set(first.prompt.input_ids.tolist()) - set(second.prompt.input_ids.tolist())
    word = min(only_in_first - {model.config.image_token_id})
    expected = answers(backend_of((model, processor)), [second])
    with torch.no_grad():
        model.get_input_embeddings().weight[word] = float("nan")
    assert word not in expected[0]
    outcomes = dict(backend_of((model, processor)).answer([first, second]))
    assert isinstance(outcomes[0], RequestError)
    assert "not finite" in str(outcomes[0])
    assert outcomes[1][0].token_ids == expected[0]


def test_new_weights_are_taken_in(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "github")
    opened, (other, _) = load(folder), load(folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5).add_(0.01)
    backend, request = backend_of(opened), requests_of(opened[1])[0]
    before = answers(backend, [request])
    backend.load(other.state_dict())
    expected = answers(backend_of((other, opened[1])), [request])
    assert answers(backend, [request]) == expected != before
