"""The simulation against queues that are solved on paper, and what must hold for any load."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from cascadevl.errors import ConfigError
from cascadevl.planning.service import Ask, Step
from cascadevl.planning.simulation import Layout, Load, Policy, simulate

TEXT = Ask(tiles=0, prompt_tokens=10, new_tokens=1)
PICTURES = Ask(tiles=3, prompt_tokens=40, new_tokens=5)
AT_ONCE = math.inf


@dataclass
class Fixed:
    """Things that take a given time, and what was asked of them."""

    tile_s: float = 0.0
    link_s: float = 0.0
    base_s: float = 0.0
    token_s: float = 0.0
    steps: list[Step] = field(default_factory=list)
    encoded: list[int] = field(default_factory=list)

    def encode_s(self, tiles: int) -> float:
        self.encoded.append(tiles)
        return self.tile_s * tiles

    def transfer_s(self) -> float:
        return self.link_s

    def step_s(self, step: Step) -> float:
        self.steps.append(step)
        return self.base_s + self.token_s * (step.prompt_tokens + step.answers)


@pytest.mark.parametrize("use", [0.4, 0.75])
def test_one_at_a_time_waits_as_the_formula_says(use: float):
    """M/D/1: a Poisson stream before a server of constant time waits use/(2(1-use)) services."""
    one = Policy(max_step_tokens=TEXT.prompt_tokens)
    load = Load(rate=use / 0.5, num_requests=15_000, seed=1)
    run = simulate(Fixed(base_s=0.5), TEXT, Layout(), load, one)
    taken = [tokens[0] - at for at, tokens in zip(run.arrivals, run.tokens, strict=True)]
    expected = 0.5 + 0.5 * use / (2 * (1 - use))
    assert sum(taken) / len(taken) == pytest.approx(expected, rel=0.06)


def test_two_servers_share_what_comes():
    """Evenly spaced arrivals at the rate of two servers: nobody waits."""
    one = Policy(max_step_tokens=TEXT.prompt_tokens)
    load = Load(rate=4.0, num_requests=50, seed=None)
    run = simulate(Fixed(base_s=0.5), TEXT, Layout(language=2), load, one)
    assert run.first_token_s(1.0) == pytest.approx(0.5)
    assert run.language_busy_s == pytest.approx(25.0)


@pytest.mark.parametrize("layout", [Layout(), Layout(vision=1), Layout(vision=3, language=2)])
@pytest.mark.parametrize("rate", [0.01, 3.0, AT_ONCE])
def test_every_request_is_answered_in_full_and_in_order(layout: Layout, rate: float):
    service = Fixed(tile_s=0.1, link_s=0.05, base_s=0.02, token_s=0.001)
    run = simulate(service, PICTURES, layout, Load(rate=rate, num_requests=60))
    assert len(run.tokens) == len(run.arrivals) == 60
    for at, tokens in zip(run.arrivals, run.tokens, strict=True):
        assert len(tokens) == PICTURES.new_tokens
        assert at < tokens[0]
        assert all(before < after for before, after in pairwise(tokens))
    assert sum(service.encoded) == 60 * PICTURES.tiles
    assert sum(step.prompt_tokens for step in service.steps) == 60 * PICTURES.prompt_tokens
    assert sum(step.first_tokens for step in service.steps) == 60
    assert sum(step.answers for step in service.steps) == 60 * (PICTURES.new_tokens - 1)
    pairs = PICTURES.prompt_tokens * (PICTURES.prompt_tokens + 1) // 2
    assert sum(step.prompt_pairs for step in service.steps) == 60 * pairs
    assert run.vision_busy_s == pytest.approx(0.1 * sum(service.encoded))


@pytest.mark.parametrize(
    ("layout", "first_s"), [(Layout(), 0.3 + 0.06), (Layout(vision=1), 0.3 + 0.05 + 0.06)]
)
def test_far_below_capacity_a_request_takes_what_it_takes(layout: Layout, first_s: float):
    service = Fixed(tile_s=0.1, link_s=0.05, base_s=0.02, token_s=0.001)
    load = Load(rate=0.01, num_requests=40, seed=None)
    run = simulate(service, PICTURES, layout, load)
    for quantile in (0.0, 0.5, 1.0):
        assert run.first_token_s(quantile) == pytest.approx(first_s)
        assert run.token_s(quantile) == pytest.approx(0.021)
    assert run.requests_per_s == pytest.approx(0.01, rel=0.05)


def test_under_too_much_load_the_slowest_stage_sets_the_pace():
    """Tiles 0.3 s, prompt and answer 0.05 s a request: alone, and beside each other."""
    service = Fixed(tile_s=0.1, token_s=0.05 / 44)
    load = Load(rate=AT_ONCE, num_requests=400)
    coupled = simulate(service, PICTURES, Layout(), load)
    assert coupled.requests_per_s == pytest.approx(1 / 0.35, rel=0.03)
    apart = simulate(service, PICTURES, Layout(vision=1), load)
    assert apart.requests_per_s == pytest.approx(1 / 0.3, rel=0.03)
    many = simulate(service, PICTURES, Layout(vision=20), load)
    assert many.requests_per_s == pytest.approx(1 / 0.05, rel=0.1)


def test_a_slow_link_is_a_stage_of_its_own():
    service = Fixed(tile_s=0.01, link_s=0.2, token_s=1e-5)
    run = simulate(service, PICTURES, Layout(vision=1), Load(rate=AT_ONCE, num_requests=100))
    assert run.requests_per_s == pytest.approx(5.0, rel=0.03)


def test_tiles_of_several_requests_are_encoded_together_up_to_a_batch():
    service = Fixed(tile_s=0.1)
    load = Load(rate=AT_ONCE, num_requests=9)
    simulate(service, PICTURES, Layout(vision=1), load, Policy(max_batch_tiles=7))
    assert service.encoded[0] == 3  # it was alone when it came
    assert service.encoded[1:-1] == [6] * (len(service.encoded) - 2)
    alone = Fixed(tile_s=0.1)
    simulate(alone, PICTURES, Layout(vision=1), load, Policy(max_batch_tiles=2))
    assert alone.encoded == [3] * 9


def test_a_step_holds_no_more_tokens_than_it_may_and_running_answers_go_first():
    service = Fixed(base_s=0.01)
    ask = Ask(tiles=0, prompt_tokens=50, new_tokens=8)
    simulate(
        service,
        ask,
        Layout(),
        Load(rate=AT_ONCE, num_requests=20),
        Policy(max_step_tokens=32, max_running=10),
    )
    assert max(step.prompt_tokens + step.answers for step in service.steps) == 32
    assert max(step.answers for step in service.steps) <= 10
    assert any(step.answers and step.prompt_tokens for step in service.steps)


def test_the_same_seed_is_the_same_run_and_another_is_not():
    def run(seed: int) -> object:
        service = Fixed(tile_s=0.1, link_s=0.05, base_s=0.02, token_s=0.001)
        return simulate(
            service, PICTURES, Layout(vision=1), Load(rate=2.0, num_requests=30, seed=seed)
        )

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_gaps_are_those_of_the_rate():
    gaps = Load(rate=5.0, num_requests=20_000, seed=2).gaps()
    assert sum(gaps) / len(gaps) == pytest.approx(0.2, rel=0.03)
    assert sum(gap > 0.2 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.02)
    assert Load(rate=4.0, num_requests=3, seed=None).gaps() == [0.25] * 3


def test_an_answer_of_one_token_has_no_time_between_tokens():
    run = simulate(Fixed(base_s=0.5), TEXT, Layout(), Load(rate=1.0, num_requests=5))
    assert math.isnan(run.token_s(0.5))


@pytest.mark.parametrize(("rate", "number"), [(0.0, 5), (1.0, 0)])
def test_no_load_is_refused(rate: float, number: int):
    with pytest.raises(ConfigError, match="must be above 0"):
        Load(rate=rate, num_requests=number)


def test_a_layout_without_a_language_server_is_refused():
    with pytest.raises(ConfigError, match="at least one"):
        Layout(language=0, vision=2)
