"""The engine with a router: full and compressed tiles in one prompt, routed for each request alone.

Held against `generate` of the model, which `tests.model.test_flash` holds against loops.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine.small_prompts import (
    END,
    GREEDY,
    START,
    by_transformers,
    engine_for,
    ids_of,
    prompts,
    text,
    tiles,
)
from tests.model.small import IMAGE, small_flash_model, small_model

from cascadevl.data.tiling import normalise
from cascadevl.engine.engine import Engine
from cascadevl.engine.packed_weights import can_pack, pack
from cascadevl.engine.prompts import prepare, routed
from cascadevl.engine.requests import (
    Completion,
    EngineConfig,
    ImageFeatures,
    ImageTiles,
    Request,
    TextIds,
)
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import RequestError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.routing import KeepShare, Thresholds, VisualBudget
from cascadevl.types import VisualFeatures

FULL, SMALL = 4, 1
BUDGETS: dict[str, VisualBudget] = {
    "full": "full",
    "compressed": "compressed",
    "share": KeepShare(0.5),
    "released": Thresholds(absolute=0.1, relative=0.4),
}


@pytest.fixture(scope="module")
def model() -> CascadeVLForConditionalGeneration:
    """Compresses all but the least probable tile of the picture that most prompts show."""
    made = small_flash_model(increment=0.25)
    with torch.no_grad():
        chances = made.encode_images(normalise(tiles(0, 3).tiles)).compress
    assert chances is not None
    low, middle, _ = sorted(chances.tolist())
    assert middle - low > 1e-3  # rounding must not decide
    made.config.flash_absolute_threshold = (low + middle) / 2
    return made


def requests(budget: VisualBudget | None = None, **more: Any) -> list[Request]:
    wish = {"sampling": GREEDY, **more}
    return [Request(prompt=prompt, visual_budget=budget, **wish) for prompt in prompts()]


def by_generate(
    model: CascadeVLForConditionalGeneration, prompt: tuple[Any, ...], budget: VisualBudget | None
) -> tuple[int, ...]:
    return by_transformers(model, prompt, 8, visual_budget=budget)


def counts_of(answers: list[tuple[Completion, ...]]) -> list[tuple[int, ...]]:
    return [each.tokens_per_tile for each, *_ in answers]


@pytest.mark.parametrize("budget", [None, *BUDGETS.values()], ids=["config", *BUDGETS])
def test_answers_are_those_of_generate_however_they_are_computed(
    model: CascadeVLForConditionalGeneration, budget: VisualBudget | None
) -> None:
    expected = [[by_generate(model, prompt, budget)] for prompt in prompts()]
    engine = engine_for(model)
    first = engine.generate(requests(budget))
    assert ids_of(first) == expected
    assert ids_of(engine.generate(requests(budget))) == expected  # from the cache
    for config in (
        {"max_step_tokens": 7},
        {"max_step_tiles": 1},
        {"num_pages": 16, "max_running": 3, "max_step_tokens": 16},
        {"feature_bytes": 0, "max_step_tiles": 2},
        {"batch_invariant": True},
    ):
        other = engine_for(model, **config)
        found = other.generate(requests(budget))
        assert ids_of(found) == expected
        assert counts_of(found) == counts_of(first)
        other.check()
        assert other.is_idle


def test_what_was_chosen_is_reported(model: CascadeVLForConditionalGeneration) -> None:
    answers = engine_for(model).generate(requests())
    mixed = answers[0][0]
    assert sorted(mixed.tokens_per_tile) == [SMALL, SMALL, FULL]
    usage = mixed.usage
    assert (usage.tiles, usage.compressed_tiles, usage.visual_tokens) == (3, 2, 6)
    assert usage.prompt_tokens == 5 + 1 + 6 + 1 + 7
    alone = answers[1][0].usage
    assert (alone.tiles, alone.compressed_tiles, alone.visual_tokens) == (0, 0, 0)
    shares = engine_for(model).generate(requests(KeepShare(0.5)))
    assert sorted(shares[0][0].tokens_per_tile) == [SMALL, FULL, FULL]


def test_with_all_tiles_kept_it_is_the_plain_model() -> None:
    plain, flash = small_model(increment=0.25), small_flash_model(increment=0.25)
    kept = {name: value for name, value in flash.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(kept)
    how = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=2)
    plain_answers = engine_for(plain).generate(
        [Request(prompt=prompt, sampling=how) for prompt in prompts()]
    )
    for budget in (None, "full", KeepShare(1.0), Thresholds(absolute=2.0)):
        found = engine_for(flash).generate(requests(budget, sampling=how))
        assert ids_of(found) == ids_of(plain_answers)
        for (one,), (other,) in zip(found, plain_answers, strict=True):
            assert one.logprobs is not None
            assert other.logprobs is not None
            pairs = zip(one.logprobs, other.logprobs, strict=True)
            assert all(abs(a.chosen - b.chosen) < 1e-5 for a, b in pairs)


def test_batch_invariant_answers_are_equal_bit_for_bit_whatever_else_runs(
    model: CascadeVLForConditionalGeneration,
) -> None:
    how = SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True, logprobs=1)
    asked = requests(KeepShare(0.5), sampling=how)[4]

    def answer(beside: list[Request], **config: Any) -> Any:
        engine = engine_for(model, batch_invariant=True, **config)
        return [(e.token_ids, e.logprobs) for e in engine.generate([*beside, asked])[-1]]

    alone = answer([])
    assert answer(requests()) == alone
    assert answer(requests("full"), num_pages=20, max_step_tokens=9, feature_bytes=0) == alone


@pytest.mark.skipif(not can_pack(small_model()), reason="oneDNN does not pack here")
def test_packed_weights_route_as_plain_ones(model: CascadeVLForConditionalGeneration) -> None:
    expected = engine_for(model).generate(requests())
    found = engine_for(pack(model, "packed")).generate(requests())
    assert ids_of(found) == ids_of(expected)
    assert counts_of(found) == counts_of(expected)


def test_samples_share_a_routed_prompt(model: CascadeVLForConditionalGeneration) -> None:
    how = SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True, seed=3)
    together = engine_for(model).generate(requests(sampling=how, num_samples=4))
    apart = engine_for(model, prefix_cache=False, max_running=1)
    assert ids_of(apart.generate(requests(sampling=how, num_samples=4))) == ids_of(together)


# What is kept.


def test_another_budget_encodes_nothing_again(model: CascadeVLForConditionalGeneration) -> None:
    engine = engine_for(model)
    prompt = prompts()[0]
    for budget in BUDGETS.values():
        engine.generate([Request(prompt=prompt, sampling=GREEDY, visual_budget=budget)])
    assert engine.stats().encoded_tiles == 3
    assert engine.stats().cached_tiles == 3 * (len(BUDGETS) - 1)


def test_tiles_encoded_for_the_router_are_not_found_but_made(
    model: CascadeVLForConditionalGeneration,
) -> None:
    engine = engine_for(model)
    engine.generate([Request(prompt=prompts()[0], sampling=GREEDY)])
    assert (engine.stats().encoded_tiles, engine.stats().cached_tiles) == (3, 0)
    engine.generate([Request(prompt=prompts()[0], sampling=GREEDY)])  # from the pages
    assert (engine.stats().encoded_tiles, engine.stats().cached_tiles) == (3, 0)


def test_pages_of_another_route_are_not_taken(model: CascadeVLForConditionalGeneration) -> None:
    """Two routes of one picture with equally many tokens at equal positions are told apart."""
    with torch.no_grad():
        features = model.encode_images(normalise(tiles(0, 2).tiles))

    def request(*chances: float) -> Request:
        known = VisualFeatures(patches=features.patches, compress=torch.tensor(chances))
        prompt = (text(0, 6), ImageFeatures((known,)), text(1, 9))
        return Request(prompt=prompt, sampling=GREEDY, visual_budget=KeepShare(0.5))

    engine = engine_for(model)
    one, other = (engine.generate([request(*c)])[0][0] for c in ((0.2, 0.8), (0.8, 0.2)))
    assert (one.tokens_per_tile, other.tokens_per_tile) == ((FULL, SMALL), (SMALL, FULL))
    assert one.usage.prompt_tokens == other.usage.prompt_tokens
    assert other.usage.cached_tokens == 4  # the one page before the picture
    fresh = engine_for(model).generate([request(0.8, 0.2)])[0][0]
    assert other.token_ids == fresh.token_ids


def test_new_weights_route_anew(model: CascadeVLForConditionalGeneration) -> None:
    trained = small_flash_model(seed=1, increment=0.25)
    engine = engine_for(small_flash_model(increment=0.25))
    budget = KeepShare(0.5)
    engine.generate(requests(budget))
    waiting = engine.add(requests(budget)[4])
    engine.load(trained.state_dict())
    expected = [[by_generate(trained, prompt, budget)] for prompt in prompts()]
    while not (done := engine.step().completions):
        pass
    assert (done[0].request_id, done[0].token_ids) == (waiting, expected[4][0])
    assert ids_of(engine.generate(requests(budget))) == expected


# Waiting for the router.


def test_few_tiles_are_encoded_in_a_step_and_answers_go_on_meanwhile(
    model: CascadeVLForConditionalGeneration,
) -> None:
    engine = engine_for(model, max_step_tiles=2)
    running = Request(prompt=(text(3, 5),), sampling=SamplingParams(max_tokens=9, ignore_eos=True))
    first = engine.add(running)
    engine.step()
    many = (text(1, 3), tiles(5, 7), text(2, 3))
    asked = engine.add(Request(prompt=many, sampling=GREEDY, visual_budget=KeepShare(0.5)))
    encoded, decoded = [], []
    while engine.opened(asked).prompt.unrouted is not None:
        before = engine.stats()
        engine.step()
        encoded.append(engine.stats().encoded_tiles - before.encoded_tiles)
        decoded.append(engine.stats().decoded_tokens - before.decoded_tokens)
    assert encoded == [2, 2, 2, 1]
    assert all(decoded)
    assert not engine.is_idle
    done = {}
    while not engine.is_idle:
        done |= {each.request_id: each for each in engine.step().completions}
    assert set(done) == {first, asked}
    assert sum(done[asked].tokens_per_tile) == 4 * FULL + 3 * SMALL
    engine.check()


def test_a_request_that_waits_for_the_router_can_be_called_off(
    model: CascadeVLForConditionalGeneration,
) -> None:
    engine = engine_for(model, max_step_tiles=1)
    asked = [engine.add(each) for each in (*requests(num_samples=2)[:1], *requests()[1:])]
    engine.step()
    engine.cancel(asked[0])
    done = {}
    while not engine.is_idle:
        for each in engine.step().completions:
            done.setdefault(each.request_id, []).append(each)
    assert [each.finish_reason for each in done[asked[0]]] == ["cancelled"] * 2
    expected = [by_generate(model, prompt, None) for prompt in prompts()]
    assert [done[number][0].token_ids for number in asked[1:]] == expected[1:]
    engine.check()


def test_a_stream_tells_increments_and_tiles_once_they_are_known() -> None:
    """The increment is the largest for what the router leaves, not for what was shown."""
    auto = small_flash_model(increment="auto", trained_context=30)
    engine = engine_for(auto)
    prompt = (text(0, 8), tiles(0, 3), text(1, 6))

    def request(budget: VisualBudget) -> Request:
        return Request(prompt=prompt, sampling=GREEDY, visual_budget=budget)

    stream = engine.stream(request(Thresholds(absolute=0.0)))
    assert stream.prompt.increments == (1.0,)
    assert (len(stream.prompt.tiles), stream.prompt.num_compressed) == (3, 3)
    tokens = [each.token_id for each in stream]
    assert stream.completions[0].token_ids == tuple(tokens)
    assert engine.stream(request("full")).prompt.increments == (0.5,)
    closed = engine.stream(request(KeepShare(0.5)))
    closed.close()
    assert closed.prompt.unrouted is not None  # and it does not wait for ever
    while not engine.is_idle:
        engine.step()
    engine.check()


def test_what_may_not_fit_is_refused_when_it_comes(
    model: CascadeVLForConditionalGeneration,
) -> None:
    engine = engine_for(model, num_pages=8)  # 32 tokens
    prompt = (text(0, 4), tiles(0, 6), text(1, 3))
    with pytest.raises(RequestError, match="a prompt of 31 tokens and up to 8 new ones"):
        engine.add(Request(prompt=prompt, sampling=GREEDY))
    wish = Request(prompt=prompt, sampling=GREEDY, visual_budget=KeepShare(0.5))
    assert engine.generate([wish])[0][0].usage.prompt_tokens == 7 + 3 * FULL + 3 * SMALL


# Parts of other forms.


def test_patch_features_that_came_with_the_request_are_routed_as_the_picture_is(
    model: CascadeVLForConditionalGeneration,
) -> None:
    picture = tiles(0, 3)
    with torch.no_grad():
        features = model.encode_images(normalise(picture.tiles))
    given = ImageFeatures((features,))
    engine = engine_for(model)
    for budget in (None, *BUDGETS.values()):
        found = engine.generate(
            [
                Request(
                    prompt=(text(0, 4), part, text(1, 3)), sampling=GREEDY, visual_budget=budget
                )
                for part in (picture, given)
            ]
        )
        assert ids_of(found)[0] == ids_of(found)[1]
        assert len(set(counts_of(found))) == 1
    assert engine.stats().encoded_tiles == 3


def test_features_of_another_model_are_refused(model: CascadeVLForConditionalGeneration) -> None:
    with torch.no_grad():
        features = model.encode_images(normalise(tiles(0, 2).tiles))
    wrong = VisualFeatures(patches=features.patches)
    narrow = VisualFeatures(patches=torch.zeros(1, 16, 8), compress=torch.zeros(1))
    engine = engine_for(model)
    for each, words in ((wrong, "without the router's"), (narrow, r"\(16, 8\) a tile, with the")):
        with pytest.raises(RequestError, match=words):
            engine.add(Request(prompt=(text(0, 4), ImageFeatures((each,))), sampling=GREEDY))


def test_visual_tokens_that_are_made_already_are_not_routed(
    model: CascadeVLForConditionalGeneration,
) -> None:
    """A budget is that of the tiles for which there is a choice."""
    made = VisualFeatures(projected=torch.ones(2, FULL, 32))
    prompt = (text(0, 4), ImageFeatures((made,)), tiles(0, 3), text(1, 3))
    request = Request(prompt=prompt, sampling=GREEDY, visual_budget=KeepShare(0.3))
    (answer,) = engine_for(model).generate([request])[0]
    assert answer.tokens_per_tile[:2] == (FULL, FULL)
    assert sorted(answer.tokens_per_tile[2:]) == [SMALL, SMALL, FULL]


def test_a_plain_model_refuses_a_budget() -> None:
    engine = engine_for(small_model())
    with pytest.raises(RequestError, match="this model has no router"):
        engine.add(requests("compressed")[0])
    assert engine.generate(requests("full")[:1])


def test_prompts_are_laid_out_at_their_longest_until_they_are_routed(
    model: CascadeVLForConditionalGeneration,
) -> None:
    request = requests()[4]
    longest = prepare(request, model.config)
    assert longest.unrouted is not None
    assert longest.tokens_per_tile == (FULL,) * 4
    chances = torch.tensor([0.0, 1.0, 1.0, 0.0])
    found = routed(longest.unrouted, chances)
    assert found.tokens_per_tile == (FULL, SMALL, SMALL, FULL)
    assert found.unrouted is None
    places = [place for tile in found.tiles for place in range(tile.start, tile.stop)]
    assert (found.tokens.ids[places] == IMAGE).all()
    assert (found.tokens.ids == IMAGE).sum() == len(places)


def test_the_order_of_arrival_is_kept_where_there_is_room_for_few(
    model: CascadeVLForConditionalGeneration,
) -> None:
    engine = Engine(
        model, config=EngineConfig(num_pages=16, page_tokens=4, max_running=1, max_step_tiles=4)
    )
    order = []
    for number, request in enumerate(requests()):
        assert engine.add(request) == number
    while not engine.is_idle:
        order += [each.request_id for each in engine.step().completions]
    assert order == list(range(6))  # also text behind a picture that waits for the router


def test_a_conversation_about_a_routed_picture_reads_only_what_is_new(
    model: CascadeVLForConditionalGeneration,
) -> None:
    engine = engine_for(model)
    picture = ImageTiles(tiles(0, 3).tiles)
    start = (text(0, 5), TextIds((START,)), picture, TextIds((END,)), text(1, 6))
    (first,) = engine.generate([Request(prompt=start, sampling=GREEDY)])[0]
    more = (*start, TextIds(first.token_ids), text(2, 4))
    (second,) = engine.generate([Request(prompt=more, sampling=GREEDY)])[0]
    assert second.tokens_per_tile == first.tokens_per_tile
    whole = first.usage.prompt_tokens + len(first.token_ids) - 1
    assert second.usage.cached_tokens == whole // 4 * 4
    assert engine.stats().encoded_tiles == 3
