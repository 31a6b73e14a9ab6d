"""The reference backend: equal to calling `generate` by hand, alone, padded and streamed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.small_backend import checkpoint, conversations, requests_of
from torch import Tensor

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import normalise
from cascadevl.engine.backends import Backend, generate
from cascadevl.engine.requests import (
    Completion,
    ImageFeatures,
    ImageTiles,
    PromptPart,
    Request,
    TextIds,
    TokenOutput,
)
from cascadevl.engine.sampling import SamplingParams
from cascadevl.engine.transformers_backend import TransformersBackend
from cascadevl.errors import CheckpointError, RequestError
from cascadevl.model.loading import load
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.types import VisualFeatures


@pytest.fixture(scope="module")
def opened(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[CascadeVLForConditionalGeneration, CascadeVLProcessor]:
    return load(checkpoint(tmp_path_factory.mktemp("checkpoint") / "github"))


def backend_of(opened: Any, **settings: Any) -> TransformersBackend:
    model, processor = opened
    return TransformersBackend(model=model, processor=processor, **settings)


def answers(backend: Backend, requests: list[Request]) -> list[tuple[int, ...]]:
    return [each.token_ids for group in generate(backend, requests) for each in group]


def by_hand(opened: Any, increments: float | None, num_tokens: int = 8) -> list[tuple[int, ...]]:
    """Greedy tokens from ids and pixels, as a user of transformers would ask for them."""
    model, processor = opened
    found = []
    for conversation in conversations():
        inputs = processor.batch([processor.prompt(conversation)], return_tensors="pt")
        made = model.generate(
            **inputs,
            increments=increments,
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=[-1],
            pad_token_id=0,
        )
        found.append(tuple(made[0, inputs["input_ids"].shape[1] :].tolist()))
    return found


@pytest.mark.parametrize("max_rows", [1, 3])
@pytest.mark.parametrize("increments", [None, 0.25])
def test_greedy_answers_are_those_of_generate(
    opened: Any, max_rows: int, increments: float | None
) -> None:
    _, processor = opened
    requests = [
        Request(prompt=each.prompt, sampling=each.sampling, increments=increments)
        for each in requests_of(processor)
    ]
    got = answers(backend_of(opened, max_rows=max_rows), requests)
    assert got == by_hand(opened, increments)


def test_it_is_a_backend_that_says_what_it_can_do(opened: Any) -> None:
    backend = backend_of(opened)
    assert isinstance(backend, Backend)
    assert backend.capabilities.increments
    assert not backend.capabilities.constrained
    request = requests_of(opened[1])[0]
    wish = SamplingParams(json_schema="{}")
    with pytest.raises(RequestError, match="cannot constrain answers"):
        generate(backend, [Request(prompt=request.prompt, sampling=wish)])


def test_parts_of_a_prompt_are_as_good_as_an_example(opened: Any) -> None:
    model, processor = opened
    request = requests_of(processor)[2]
    example = request.prompt
    slots = (example.input_ids == model.config.image_token_id).nonzero()[0]
    first, second = (
        example.tiles[: example.tiles_per_image[0]],
        example.tiles[example.tiles_per_image[0] :],
    )
    with torch.inference_mode():
        projected = model.encode_images(normalise(second)).projected
    groups = (VisualFeatures(projected=projected[:1]), VisualFeatures(projected=projected[1:]))
    ids = tuple(example.input_ids.tolist())
    parts: tuple[PromptPart, ...] = (
        TextIds(ids[: slots[0]]),
        ImageTiles(first),
        TextIds(ids[slots[0] + 1 : slots[1]]),
        ImageFeatures(groups),
        TextIds(ids[slots[1] + 1 :]),
    )
    again = Request(prompt=parts, sampling=request.sampling)
    one, other = (group[0] for group in generate(backend_of(opened), [request, again]))
    assert one.token_ids == other.token_ids
    assert one.usage == other.usage
    tokens = sum(example.tiles_per_image) * model.tokens_per_tile
    assert one.usage.visual_tokens == tokens
    assert one.usage.prompt_tokens == len(ids) - 2 + tokens
    assert one.increments == (1.0, 1.0)


def test_samples_differ_and_depend_on_the_seed_alone(opened: Any) -> None:
    backend = backend_of(opened, max_rows=4)
    requests = requests_of(opened[1], num_samples=4, temperature=1.0, seed=3)
    drawn = answers(backend, requests)
    torch.manual_seed(77)  # what else draws from torch's generator must not matter
    before = torch.random.get_rng_state()
    assert answers(backend, requests[::-1]) == drawn[8:] + drawn[4:8] + drawn[:4]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(set(drawn)) > 8
    others = answers(backend, requests_of(opened[1], num_samples=4, temperature=1.0, seed=4))
    assert others != drawn


def test_greedy_samples_are_computed_once(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    decode = CascadeVLForConditionalGeneration.decode

    def counting(self: Any, inputs_embeds: Tensor, *args: Any, **more: Any) -> Any:
        rows.append(len(inputs_embeds))
        return decode(self, inputs_embeds, *args, **more)

    monkeypatch.setattr(CascadeVLForConditionalGeneration, "decode", counting)
    (group,) = generate(backend_of(opened), requests_of(opened[1], num_samples=3)[:1])
    assert len({each.token_ids for each in group}) == 1
    assert [each.sample for each in group] == [0, 1, 2]
    assert set(rows) == {1}


def test_logprobs_are_those_of_the_whole_sequence(opened: Any) -> None:
    model, processor = opened
    request = requests_of(processor, logprobs=2, repetition_penalty=1.3)[0]
    ((answer,),) = generate(backend_of(opened), [request])
    inputs = processor.batch([request.prompt], return_tensors="pt")
    ids = torch.cat([inputs["input_ids"][0], torch.tensor(answer.token_ids)])
    with torch.inference_mode():
        logits = model(input_ids=ids[None], pixel_values=inputs["pixel_values"]).logits[0]
    rows = logits.log_softmax(-1)[-1 - len(answer.token_ids) : -1]
    assert answer.logprobs is not None
    assert len(answer.logprobs) == len(answer.token_ids) == 8
    for row, token, thought in zip(rows, answer.token_ids, answer.logprobs, strict=True):
        assert thought.chosen == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(2)
        assert [token for token, _ in thought.top] == best.indices.tolist()
        assert [value for _, value in thought.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_answers_end_where_they_are_asked_to(opened: Any) -> None:
    _, processor = opened
    backend = backend_of(opened)
    ((whole,),) = generate(backend, requests_of(processor)[:1])
    assert (whole.finish_reason, whole.usage.completion_tokens) == ("length", 8)

    ended = whole.token_ids[5]
    place = whole.token_ids.index(ended)
    ((answer,),) = generate(backend, requests_of(processor, stop_token_ids=(ended,))[:1])
    assert answer.finish_reason == "stop"
    assert answer.token_ids == whole.token_ids[:place]
    assert answer.usage.completion_tokens == place + 1  # the stop token was computed, too

    texts = [processor.decode(whole.token_ids[:n], skip_special_tokens=True) for n in range(9)]
    marker = texts[8][len(texts[8]) // 2 :][:3]
    ((answer,),) = generate(backend, requests_of(processor, stop=(marker,))[:1])
    assert answer.finish_reason == "stop"
    assert answer.text == texts[8].partition(marker)[0]
    assert answer.usage.completion_tokens == len(answer.token_ids)


def test_the_models_own_ends_count_unless_they_are_to_be_ignored(opened: Any) -> None:
    model, processor = opened
    ((whole,),) = generate(backend_of(opened), requests_of(processor)[:1])
    kept = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [whole.token_ids[3]]
    try:
        ((answer,),) = generate(backend_of(opened), requests_of(processor, ignore_eos=False)[:1])
        ((ignoring,),) = generate(backend_of(opened), requests_of(processor)[:1])
        ((later,),) = generate(
            backend_of(opened), requests_of(processor, ignore_eos=False, min_tokens=6)[:1]
        )
    finally:
        model.generation_config.eos_token_id = kept
    assert answer.token_ids == whole.token_ids[: whole.token_ids.index(whole.token_ids[3])]
    assert ignoring.token_ids == whole.token_ids
    assert len(later.token_ids) >= 6


def test_what_is_wrong_with_one_request_is_its_outcome(opened: Any) -> None:
    _, processor = opened
    good, bad = requests_of(processor)[:2]
    wrong = Request(prompt=good.prompt, sampling=good.sampling, increments=(0.5, 0.5, 0.5))
    outcomes = dict(backend_of(opened, max_rows=2).answer([good, wrong, bad]))
    assert isinstance(outcomes[1], RequestError)
    assert "3" in str(outcomes[1])
    assert [len(outcomes[number]) for number in (0, 2)] == [1, 1]
    with pytest.raises(RequestError):
        generate(backend_of(opened), [good, wrong])


def test_requests_are_taken_as_there_is_room(opened: Any) -> None:
    taken: list[int] = []

    def asked() -> Any:
        for number, request in enumerate(requests_of(opened[1])):
            taken.append(number)
            yield request

    outcomes = backend_of(opened).answer(asked())
    next(outcomes)
    assert taken == [0]


def collected(backend: Backend, request: Request) -> list[TokenOutput]:
    async def collect() -> list[TokenOutput]:
        return [output async for output in backend.stream(request)]

    return asyncio.run(collect())


def check_stream(outputs: list[TokenOutput], answers: tuple[Completion, ...]) -> None:
    for answer in answers:
        mine = [output for output in outputs if output.sample == answer.sample]
        assert "".join(output.text for output in mine) == answer.text
        tokens = tuple(output.token_id for output in mine if output.token_id is not None)
        assert tokens[: len(answer.token_ids)] == answer.token_ids
        assert len(tokens) == answer.usage.completion_tokens
        assert [output.finish_reason for output in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == answer.finish_reason


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_the_answer_piece_by_piece(opened: Any, temperature: float) -> None:
    backend = backend_of(opened)
    request = requests_of(opened[1], num_samples=2, temperature=temperature)[2]
    check_stream(collected(backend, request), generate(backend, [request])[0])


def test_a_stream_that_nobody_reads_any_more_ends_the_work(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    decode = CascadeVLForConditionalGeneration.decode

    def counting(self: Any, inputs_embeds: Tensor, *args: Any, **more: Any) -> Any:
        steps.append(inputs_embeds.shape[1])
        return decode(self, inputs_embeds, *args, **more)

    async def read_two() -> None:
        outputs = backend_of(opened).stream(requests_of(opened[1], max_tokens=400)[1])
        await anext(outputs)
        await anext(outputs)
        await outputs.aclose()  # type: ignore[attr-defined]

    monkeypatch.setattr(CascadeVLForConditionalGeneration, "decode", counting)
    asyncio.run(read_two())  # waits for its threads
    assert 2 <= len(steps) < 400


def test_errors_reach_whoever_reads_the_stream(opened: Any) -> None:
    request = requests_of(opened[1])[0]
    wrong = Request(prompt=request.prompt, increments=(0.5, 0.5, 0.5))
    with pytest.raises(RequestError):
        collected(backend_of(opened), wrong)


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
    state = other.state_dict()
    del state["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lack 1 of .*lm_head"):
        backend.load(state)
