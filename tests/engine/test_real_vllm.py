"""The vLLM backend against a real vLLM server on the CPU: the same tokens as the whole model.

Slow, and needs vLLM in an environment of its own: `make setup-vllm`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.engine.real_vllm import vllm_server
from tests.engine.small_backend import checkpoint, requests_of, vllm_checkpoint
from tests.engine.test_transformers_backend import check_stream, collected

from cascadevl.engine.backends import Backend, generate
from cascadevl.engine.http_json import HttpServer
from cascadevl.engine.requests import Completion, Request
from cascadevl.engine.transformers_backend import TransformersBackend
from cascadevl.engine.vllm import VllmBackend, connect
from cascadevl.errors import RequestError
from cascadevl.model.language_export import export_language
from cascadevl.model.loading import load
from cascadevl.model.vision_half import load_vision_half

NO_FREE_SPACE = {"backend": "xgrammar", "disable_any_whitespace": True}
"""With free white space a random model fills the answer with it (docs/concepts/vllm.md)."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vllm_checkpoint(tmp_path_factory.mktemp("checkpoint") / "whole")


@pytest.fixture(scope="module")
def served(whole: Path) -> Iterator[VllmBackend]:
    text = whole.with_name("text")
    export_language(whole, text)
    flags = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8")
    flags += ("--structured-outputs-config", json.dumps(NO_FREE_SPACE))
    with vllm_server(text, whole.with_name("log.txt"), *flags) as url:
        yield connect(*load_vision_half(whole), HttpServer(url=url))


@pytest.fixture(scope="module")
def reference(whole: Path) -> TransformersBackend:
    model, processor = load(whole)
    return TransformersBackend(model=model, processor=processor)


def both(
    one: Backend, other: Backend, requests: list[Request]
) -> Iterator[tuple[Completion, Completion]]:
    for mine, theirs in zip(generate(one, requests), generate(other, requests), strict=True):
        yield from zip(mine, theirs, strict=True)


def check_equal(mine: Completion, theirs: Completion) -> None:
    assert mine.token_ids == theirs.token_ids
    assert (mine.text, mine.finish_reason) == (theirs.text, theirs.finish_reason)
    assert mine.usage.completion_tokens == theirs.usage.completion_tokens
    assert mine.usage.visual_tokens == theirs.usage.visual_tokens


@pytest.mark.parametrize(
    "wishes",
    [
        {"max_tokens": 24},
        {"max_tokens": 24, "ignore_eos": False, "min_tokens": 5},
        {"max_tokens": 24, "repetition_penalty": 1.0, "num_samples": 2},
    ],
    ids=["plain", "own ends", "samples"],
)
def test_greedy_answers_equal_those_of_the_whole_model(
    served: VllmBackend, reference: TransformersBackend, wishes: dict[str, Any]
) -> None:
    answers = set()
    for mine, theirs in both(served, reference, requests_of(served.processor, **wishes)):
        check_equal(mine, theirs)
        answers.add(mine.token_ids)
    assert len(answers) == 3  # every picture has an answer of its own


def test_answers_end_where_the_whole_model_ends_them(
    served: VllmBackend, reference: TransformersBackend
) -> None:
    request = requests_of(served.processor, max_tokens=24)[0]
    ((whole,),) = generate(reference, [request])
    marker = next(each for each in whole.text[len(whole.text) // 2 :] if each != "\ufffd")
    for wishes in ({"stop": (marker,)}, {"stop_token_ids": (whole.token_ids[9],)}):
        ended = requests_of(served.processor, max_tokens=24, **wishes)[:1]
        ((mine, theirs),) = both(served, reference, ended)
        check_equal(mine, theirs)
        assert mine.finish_reason == "stop"


def test_logprobs_equal_those_of_the_whole_model(
    served: VllmBackend, reference: TransformersBackend
) -> None:
    requests = requests_of(served.processor, logprobs=3)
    for mine, theirs in both(served, reference, requests):
        for one, other in zip(mine.logprobs, theirs.logprobs, strict=True):
            assert one.chosen == pytest.approx(other.chosen, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_drawn_samples_differ_and_come_again(served: VllmBackend) -> None:
    requests = requests_of(served.processor, num_samples=4, temperature=1.0, seed=2**64 - 1)[:1]
    (drawn,), (again,) = generate(served, requests), generate(served, requests)
    assert len({answer.token_ids for answer in drawn}) > 1
    assert [each.token_ids for each in drawn] == [each.token_ids for each in again]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_the_answer_piece_by_piece(served: VllmBackend, temperature: float) -> None:
    wishes = {"num_samples": 2, "temperature": temperature, "seed": 3, "logprobs": 1}
    request = requests_of(served.processor, **wishes)[0]
    check_stream(collected(served, request), generate(served, [request])[0])


def test_an_answer_follows_a_schema(served: VllmBackend) -> None:
    schema = {
        "type": "object",
        "properties": {"red": {"type": "boolean"}},
        "required": ["red"],
        "additionalProperties": False,
    }
    request = requests_of(
        served.processor, json_schema=json.dumps(schema), ignore_eos=False, max_tokens=100
    )[0]
    ((answer,),) = generate(served, [request])
    assert isinstance(json.loads(answer.text)["red"], bool)


def test_what_does_not_fit_there_is_a_failure_of_that_request(served: VllmBackend) -> None:
    good = requests_of(served.processor)[1]
    long = requests_of(served.processor, max_tokens=505)[0]
    outcomes = dict(served.answer([good, long]))
    assert not isinstance(outcomes[0], RequestError)
    assert isinstance(outcomes[1], RequestError)
    assert "the vLLM server takes 512" in str(outcomes[1])


def test_embeddings_of_another_model_are_refused_with_the_reason(
    served: VllmBackend, tmp_path: Path
) -> None:
    other = load_vision_half(checkpoint(tmp_path / "other"))
    wrong = connect(*other, served.server)
    with pytest.raises(RequestError, match="the language half of this very checkpoint"):
        list(wrong.answer(requests_of(other[1])))
