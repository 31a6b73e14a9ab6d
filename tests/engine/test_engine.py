"""The engine against transformers' generate and against itself: what must not change an answer."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.small_prompts import (
    GREEDY,
    by_transformers,
    engine_for,
    ids_of,
    prompts,
    requests,
    text,
    tiles,
)
from tests.model.bodies import BODIES, body_model
from tests.model.small import IMAGE, VOCAB, small_model

from cascadevl.data.tiling import normalise
from cascadevl.engine.engine import Engine
from cascadevl.engine.packed_weights import can_pack, pack
from cascadevl.engine.requests import (
    EngineConfig,
    ImageFeatures,
    ImageTiles,
    Request,
    StepResult,
    TextIds,
)
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import CheckpointError, ConfigError, LogitsError, RequestError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.types import VisualFeatures


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


DRAWN = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, seed=5)


def test_samples_share_their_prompt_and_are_those_of_samples_drawn_apart() -> None:
    model = small_model(increment=0.25)
    shared = engine_for(model)
    together = shared.generate(requests(DRAWN, num_samples=5))
    assert len({each.token_ids for each in together[0]}) > 1
    assert together[0] != together[5]  # the same prompt with the same seed: equal draws
    assert ids_of(together)[0] == ids_of(together)[5]
    prompt_tokens = sum(each[0].usage.prompt_tokens for each in together)
    assert shared.stats().prompt_tokens < prompt_tokens  # prompts that begin alike share it, too
    assert shared.stats().prompt_tokens + shared.stats().cached_tokens == 5 * prompt_tokens
    apart = engine_for(model, prefix_cache=False, max_running=1)
    assert ids_of(apart.generate(requests(DRAWN, num_samples=5))) == ids_of(together)
    tiny = engine_for(model, num_pages=14, max_running=7, max_step_tokens=20)
    assert ids_of(tiny.generate(requests(DRAWN, num_samples=5))) == ids_of(together)
    assert tiny.stats().preemptions > 0
    assert tiny.stats().free_pages == 14


def logits_seen(model: CascadeVLForConditionalGeneration) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("body", ["qwen3", "gpt_oss", "qwen3_moe"])
def test_batch_invariant_logprobs_are_equal_bit_for_bit_whatever_else_runs(
    body: str, dtype: torch.dtype
) -> None:
    model = body_model(body, increment=0.25).to(dtype)
    how = SamplingParams(temperature=1.0, max_tokens=9, ignore_eos=True, logprobs=2)
    asked = requests(how)[4]

    def answer(beside: list[Request], **config: Any):
        engine = engine_for(model, batch_invariant=True, **config)
        found = engine.generate([*beside[:2], asked, *beside[2:]])[min(len(beside), 2)]
        return [(each.token_ids, each.logprobs) for each in found]

    alone = answer([])
    assert answer(requests(DRAWN, num_samples=3)) == alone
    assert answer(requests(), num_pages=20, max_step_tokens=9, feature_bytes=0) == alone


def test_logprobs_are_those_of_one_forward_pass_of_the_model() -> None:
    model = small_model(increment=0.5)
    how = SamplingParams(temperature=0.7, max_tokens=6, ignore_eos=True, logprobs=3)
    for prompt, (answer,) in zip(prompts(), engine_for(model).generate(requests(how)), strict=True):
        ids, pixels = [], []
        for part in prompt:
            if isinstance(part, TextIds):
                ids += part.ids
            else:
                ids += [IMAGE] * 4 * len(part.tiles)
                pixels.append(normalise(part.tiles))
        images = {"pixel_values": torch.cat(pixels)} if pixels else {}
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *answer.token_ids]]), **images).logits[0]
        expected = logits[len(ids) - 1 : -1].log_softmax(-1)
        assert answer.logprobs is not None
        for row, token, found in zip(expected, answer.token_ids, answer.logprobs, strict=True):
            assert found.chosen == pytest.approx(float(row[token]), abs=1e-4)
            values = [value for _, value in found.top]
            assert values == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_features_that_came_with_the_request_answer_as_the_picture_does() -> None:
    model = small_model(increment=0.5)
    picture = tiles(0, 3)
    with torch.no_grad():
        projected = model.encode_images(normalise(picture.tiles)).projected
    whole = ImageFeatures((VisualFeatures(projected=projected),))
    engine = engine_for(model)
    found = engine.generate(
        [
            Request(prompt=(text(0, 4), part, text(1, 3)), sampling=GREEDY)
            for part in (picture, whole)
        ]
    )
    assert found[0][0].token_ids == found[1][0].token_ids
    assert engine.stats().encoded_tiles == 3


def test_tiles_with_different_numbers_of_tokens_make_one_picture() -> None:
    """Full and compressed tiles, as InternVL3.5-Flash has them, stand one behind the other."""
    model = small_model(increment=0.5)
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(2, 4, 32, generator=generator)
    small = torch.randn(1, 1, 32, generator=generator)
    picture = ImageFeatures((VisualFeatures(projected=full), VisualFeatures(projected=small)))
    prompt = (text(0, 4), picture, text(1, 3))
    (answer,) = engine_for(model).generate([Request(prompt=prompt, sampling=GREEDY)])[0]
    assert answer.usage.visual_tokens == 9
    assert answer.increments == (0.5,)
    ids = [*text(0, 4).ids, *[IMAGE] * 9, *text(1, 3).ids]
    embeds = model.get_input_embeddings()(torch.tensor([ids])).detach().clone()
    embeds[0, 4:13] = torch.cat([full.flatten(0, 1), small[0]])
    steps = torch.tensor([0.0, 1, 1, 1, *[0.5] * 9, 1, 1, 1])
    with torch.no_grad():
        logits = model.decode(embeds, steps.cumsum(0)[None], logits_to_keep=1).logits
    assert int(logits[0, -1].argmax()) == answer.token_ids[0]


def test_a_second_question_about_a_picture_encodes_nothing() -> None:
    model, how = small_model(increment=0.5), SamplingParams(max_tokens=2)

    def ask(number: int, *parts: Any) -> tuple[Request]:
        return (Request(prompt=(*parts, text(number, 5)), sampling=how),)

    engine = engine_for(model, prefix_cache=False)
    for number in range(2):
        engine.generate(ask(number, text(number, 3), tiles(0, 3)))
    assert (engine.stats().encoded_tiles, engine.stats().cached_tiles) == (3, 3)
    engine = engine_for(model)
    for number in range(2):  # here the pages hold it, and the tiles are not even asked for
        engine.generate(ask(number, text(0, 4), tiles(0, 3)))
    assert (engine.stats().encoded_tiles, engine.stats().cached_tiles) == (3, 0)


@pytest.mark.parametrize("feature_bytes", [0, 600, 10**6])
def test_neither_few_tiles_a_step_nor_little_room_for_features_changes_answers(
    feature_bytes: int,
) -> None:
    model = small_model(increment=0.25)
    expected = ids_of(engine_for(model).generate(requests()))
    few = engine_for(model, max_step_tiles=1, feature_bytes=feature_bytes, max_step_tokens=11)
    assert ids_of(few.generate(requests())) == expected


def run_until_idle(engine) -> list[StepResult]:
    results = []
    while not engine.is_idle:
        results.append(engine.step())
        assert len(results) < 1000
    return results


def test_what_is_called_off_is_free_at_once_and_reported() -> None:
    engine = engine_for(small_model(), max_running=3)
    kept, running, waiting = (
        engine.add(Request(prompt=prompt, sampling=DRAWN, num_samples=2, stream=True))
        for prompt in prompts()[:3]
    )
    engine.step()
    engine.cancel(running)
    engine.cancel(waiting)
    engine.cancel(99)
    results = run_until_idle(engine)
    ended = {(c.request_id, c.sample): c.finish_reason for r in results for c in r.completions}
    assert ended == {(kept, 0): "length", (kept, 1): "length"} | {
        (number, sample): "cancelled" for number in (running, waiting) for sample in (0, 1)
    }
    assert engine.stats().free_pages == 200
    last = {(t.request_id, t.sample): t for r in results for t in r.tokens if t.finish_reason}
    assert {order: token.finish_reason for order, token in last.items()} == ended
    assert [token.token_id is None for token in last.values()].count(True) == 4


def test_a_stream_gives_the_tokens_of_the_answer_and_may_be_left_early() -> None:
    engine = engine_for(small_model())
    request = Request(prompt=prompts()[0], sampling=GREEDY)
    ((expected,),) = engine.generate([request])
    assert tuple(each.token_id for each in engine.stream(request)) == expected.token_ids
    left = engine.stream(request)
    next(left)
    left.close()
    run_until_idle(engine)
    assert engine.stats().free_pages == 200


def test_asynchronous_streams_run_side_by_side() -> None:
    engine = engine_for(small_model(increment=0.25))
    expected = engine_for(engine.model).generate(requests(DRAWN, num_samples=2))

    async def collect(request: Request) -> list[tuple[int, ...]]:
        found: dict[int, list[int]] = {0: [], 1: []}
        async for token in engine.astream(request):
            assert token.token_id is not None
            found[token.sample].append(token.token_id)
        return [tuple(found[0]), tuple(found[1])]

    async def all_of_them() -> list[list[tuple[int, ...]]]:
        return await asyncio.gather(*map(collect, requests(DRAWN, num_samples=2)))

    assert asyncio.run(all_of_them()) == ids_of(expected)
    assert engine.stats().steps < 6 * 8  # steps were shared


def test_new_weights_answer_as_a_model_that_always_had_them_would() -> None:
    old, new = small_model(seed=0, increment=0.25), small_model(seed=1, increment=0.25)
    expected = ids_of(engine_for(new).generate(requests()))
    engine = engine_for(old)
    assert ids_of(engine.generate(requests())) != expected
    engine.load(new.state_dict())
    assert ids_of(engine.generate(requests())) == expected
    assert engine.stats().encoded_tiles == 8  # nothing was kept of the old features


@pytest.mark.skipif(not can_pack(small_model()), reason="oneDNN does not pack here")
def test_a_packed_model_answers_and_takes_new_weights() -> None:
    old, new = small_model(seed=0, increment=0.25), small_model(seed=1, increment=0.25)
    engine = Engine(pack(old, "packed"), config=EngineConfig(num_pages=100, page_tokens=4))
    assert ids_of(engine.generate(requests())) == ids_of(engine_for(old).generate(requests()))
    engine.load(new.state_dict())
    assert ids_of(engine.generate(requests())) == ids_of(engine_for(new).generate(requests()))


def test_new_weights_in_the_middle_of_an_answer_read_everything_anew() -> None:
    model, new = small_model(seed=0), small_model(seed=1)
    engine = engine_for(model)
    number = engine.add(Request(prompt=prompts()[0], sampling=GREEDY))
    for _ in range(4):
        engine.step()
    engine.load(new.state_dict())
    (answer,) = [c for r in run_until_idle(engine) for c in r.completions]
    assert answer.request_id == number
    said = answer.token_ids[:4]
    ((rest,),) = engine_for(new).generate(
        [
            Request(
                prompt=(*prompts()[0], TextIds(said)),
                sampling=SamplingParams(max_tokens=4, ignore_eos=True),
            )
        ]
    )
    assert answer.token_ids[4:] == rest.token_ids


def test_weights_of_another_model_are_refused_and_nothing_changes() -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = engine_for(model)
    state = small_model(seed=1).state_dict()
    with pytest.raises(CheckpointError, match="lack 1 of"):
        engine.load({name: state[name] for name in list(state)[1:]})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is"):
        engine.load(state | {"lm_head.weight": torch.zeros(3, 3)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("when", [1, 2, 3, 6])
def test_an_interrupted_step_leaves_nothing_wrong_behind(when: int) -> None:
    """Ctrl-C in the middle of a forward pass: some layers have the new tokens, others do not."""
    model = small_model(increment=0.25)
    expected = ids_of(engine_for(model).generate(requests(DRAWN, num_samples=3)))
    engine, calls = engine_for(model, max_step_tokens=30), 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == when:
            raise KeyboardInterrupt

    handle = model.model.language_model.layers[-1].register_forward_pre_hook(interrupt)
    numbers = [engine.add(request) for request in requests(DRAWN, num_samples=3)]
    found: dict[int, dict[int, tuple[int, ...]]] = {number: {} for number in numbers}
    while not engine.is_idle:
        try:
            result = engine.step()
        except KeyboardInterrupt:
            continue
        for each in result.completions:
            found[each.request_id][each.sample] = each.token_ids
    handle.remove()
    assert calls > when
    assert [[found[n][s] for s in range(3)] for n in numbers] == expected


def test_logits_that_are_not_finite_end_their_request_only() -> None:
    model = small_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = float("nan")
    engine = engine_for(model)
    bad = engine.add(Request(prompt=(TextIds((9, 50, 9)),), sampling=GREEDY))
    good = engine.add(Request(prompt=(TextIds((9, 51, 9)),), sampling=GREEDY))
    with pytest.raises(LogitsError, match=f"request {bad}"):
        engine.step()
    ended = {c.request_id: c.finish_reason for r in run_until_idle(engine) for c in r.completions}
    assert ended == {bad: "cancelled", good: "length"}


def test_the_mode_of_the_model_is_left_as_it_was() -> None:
    model = small_model(drop_path_rate=0.9)
    expected = ids_of(engine_for(model).generate(requests()))
    model.train()
    assert ids_of(engine_for(model).generate(requests())) == expected
    assert model.training


# What is refused


def test_an_attention_that_knows_no_pages_is_refused() -> None:
    model = small_model()
    model.model.language_model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="attention by 'eager', which knows no pages"):
        engine_for(model).generate(requests()[:1])
    model.model.language_model.set_attn_implementation("cascadevl")
    assert engine_for(model).generate(requests()[:1])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((TextIds(()),), "no tokens"),
        ((TextIds((VOCAB,)),), f"token {VOCAB} is not one of the model's {VOCAB}"),
        ((TextIds((IMAGE,)),), "image-context token 7"),
        ((ImageFeatures((VisualFeatures(projected=torch.zeros(1, 4, 31)),)),), "width 31"),
        ((ImageFeatures(()),), "no visual tokens"),
    ],
)
def test_a_prompt_that_does_not_fit_the_model_is_refused(prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine_for(small_model()).add(Request(prompt=prompt))


def test_tiles_of_another_size_are_refused() -> None:
    wrong = ImageTiles(np.zeros((1, 14, 14, 3), dtype=np.uint8))
    with pytest.raises(RequestError, match=r"1 tiles of 14 x 14 pixels; .* 28 x 28"):
        engine_for(small_model()).add(Request(prompt=(wrong,)))


def test_what_is_too_long_is_refused_with_both_numbers_before_anything_is_computed() -> None:
    model = small_model(trained_context=30)
    model.model.vision_tower.register_forward_hook(lambda *_: pytest.fail("it was computed"))
    with pytest.raises(RequestError, match=r"needs 38 positions .* trained for 30"):
        engine_for(model).add(Request(prompt=prompts()[3], sampling=GREEDY))
    with pytest.raises(RequestError, match=r"needs 10 pages .* engine has 9"):
        engine_for(small_model(), num_pages=9).add(Request(prompt=prompts()[3], sampling=GREEDY))


def test_dynamic_rope_beyond_its_limit_is_refused_with_both_numbers() -> None:
    model = body_model("internlm2")  # 512 positions
    long = Request(prompt=(text(0, 500),), sampling=SamplingParams(max_tokens=13))
    with pytest.raises(RequestError, match="needs 513 positions but beyond 512"):
        engine_for(model).add(long)
    picture = (text(0, 490), tiles(0, 6), text(1, 3))
    how = SamplingParams(max_tokens=10)
    with pytest.raises(RequestError, match="needs 527 positions but beyond 512"):
        engine_for(model).add(Request(prompt=picture, sampling=how))
    engine_for(model).add(Request(prompt=picture, sampling=how, increments=0.25))
