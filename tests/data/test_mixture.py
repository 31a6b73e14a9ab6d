"""Mixtures: exact ratios, each record once an epoch, every draw a function of its number."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from math import factorial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadevl.data.mixture import Draw, Mixture, WeightedSource, next_position
from cascadevl.data.permutation import permuted
from cascadevl.errors import ConfigError
from cascadevl.types import Message, Record


class Numbers:
    """A source of a given length whose records say where they came from."""

    def __init__(self, name: str, length: int) -> None:
        self.name, self.length = name, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Record:
        return Record(
            source=f"{self.name}:{index}",
            record_id=str(index),
            messages=(Message.of("user", "hi"),),
        )


def source(
    name: str, length: int, weight: float | None = None, repeat: float = 1.0
) -> WeightedSource:
    return WeightedSource(source=Numbers(name, length), weight=weight, repeat=repeat)


def first(mixture: Mixture, number: int) -> list[Draw]:
    return [mixture.draw(position) for position in range(number)]


def names(draws: list[Draw]) -> Counter[str]:
    return Counter(draw.source_name for draw in draws)


def test_ratios_are_exact_in_every_block() -> None:
    mixture = Mixture([source("text", 7, 1.0), source("images", 50, 2.5)], seed=3)
    assert mixture.block_size == 7  # 1 : 2.5 is 2 : 5
    assert mixture.shares == {"text": 2 / 7, "images": 5 / 7}
    for block in range(20):
        draws = [mixture.draw(block * 7 + offset) for offset in range(7)]
        assert names(draws) == {"text": 2, "images": 5}
    assert Mixture([source("text", 7, 1.0), source("images", 7, 3.0)], seed=3).block_size == 4


def test_blocks_are_shuffled_each_in_its_own_way() -> None:
    mixture = Mixture([source("a", 5, 1.0), source("b", 5, 1.0), source("c", 5, 2.0)], seed=0)
    orders = [
        "".join(mixture.draw(block * 4 + offset).source_name for offset in range(4))
        for block in range(300)
    ]
    assert len(set(orders)) == 12  # all orders of a, b, c, c
    assert Counter(orders).most_common(1)[0][1] < 60


def test_without_weights_all_epochs_last_equally_long() -> None:
    mixture = Mixture([source("a", 30), source("b", 10), source("c", 10, repeat=0.5)], seed=1)
    draws = first(mixture, 45)
    assert names(draws) == {"a": 30, "b": 10, "c": 5}
    assert {(draw.source_name, draw.index) for draw in draws if draw.source_name != "c"} == {
        *(("a", index) for index in range(30)),
        *(("b", index) for index in range(10)),
    }
    # a repeat factor of 1/2 does not drop the second half for ever
    later = [mixture.draw(position) for position in range(45, 90)]
    seen = {draw.index for draw in [*draws, *later] if draw.source_name == "c"}
    assert seen == set(range(10))


def test_each_record_once_an_epoch_in_an_order_of_its_own() -> None:
    mixture = Mixture([source("a", 9, 1.0), source("b", 4, 2.0)], seed=5)
    by_epoch: dict[tuple[str, int], list[int]] = {}
    for draw in first(mixture, 3 * 9 * 8):
        by_epoch.setdefault((draw.source_name, draw.epoch), []).append(draw.index)
    epochs_of_a = [indices for (name, _), indices in by_epoch.items() if name == "a"]
    assert len(epochs_of_a) == 8
    assert all(sorted(indices) == list(range(9)) for indices in epochs_of_a)
    assert len({tuple(indices) for indices in epochs_of_a}) == 8
    assert all(
        sorted(indices) == list(range(4)) for (name, _), indices in by_epoch.items() if name == "b"
    )


def test_ratios_that_must_be_rounded_are_close_and_leave_no_source_out() -> None:
    weights = {"a": 3.14159, "b": 1000.0, "c": 0.271828}
    mixture = Mixture([source(name, 3, weight) for name, weight in weights.items()], seed=0)
    for name, weight in weights.items():
        assert mixture.shares[name] == pytest.approx(weight / sum(weights.values()), rel=1e-3)


def test_a_draw_is_a_function_of_seed_and_position() -> None:
    def make(seed: int) -> Mixture:
        return Mixture([source("a", 100, 1.0), source("b", 100, 1.0)], seed=seed)

    draws = first(make(1), 200)
    backwards = [make(1).draw(position) for position in reversed(range(200))]
    assert draws == backwards[::-1]
    assert [draw.position for draw in draws] == list(range(200))
    others = first(make(2), 200)
    same = sum(
        (one.source_name, one.index) == (two.source_name, two.index)
        for one, two in zip(draws, others, strict=True)
    )
    assert same < 10


def test_another_source_does_not_change_the_order_within_the_first() -> None:
    alone = [draw.index for draw in first(Mixture([source("a", 20, 1.0)], seed=4), 20)]
    mixed = Mixture([source("b", 5, 1.0), source("a", 20, 1.0)], seed=4)
    in_mixture = [draw for draw in first(mixed, 40) if draw.source_name == "a"]
    # a block of two draws keeps the ranks of a source in their order
    assert [draw.index for draw in in_mixture] == alone


def test_a_billion_records_cost_no_memory() -> None:
    mixture = Mixture([source("huge", 10**9, 1.0), source("b", 3, 1.0)], seed=0)
    draw = mixture.draw(5 * 10**9)
    assert draw.epoch == 2 if draw.source_name == "huge" else draw.epoch > 10**8
    indices = {draw.index for draw in first(mixture, 1000) if draw.source_name == "huge"}
    assert len(indices) == 500
    assert max(indices) > 9 * 10**8 > 10**8 > min(indices)


@settings(max_examples=40)
@given(st.integers(1, 120), st.integers(0, 2**64 - 1))
def test_permuted_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_small_permutations_are_nearly_uniform(size: int) -> None:
    num = 2400
    found = Counter(
        tuple(permuted(index, size, key * 7919) for index in range(size)) for key in range(num)
    )
    assert len(found) == factorial(size)
    expected = num / factorial(size)
    assert max(found.values()) < expected + 6 * expected**0.5 + 0.35 * expected
    assert min(found.values()) > expected - 6 * expected**0.5 - 0.35 * expected


def test_permutations_of_successive_keys_are_unrelated() -> None:
    size = 1000
    orders = [[permuted(index, size, key) for index in range(size)] for key in (10, 11)]
    equal = sum(one == two for one, two in zip(*orders, strict=True))
    assert equal < 10
    steps = [abs(b - a) for a, b in zip(orders[0], orders[0][1:], strict=False)]
    assert sum(steps) / len(steps) == pytest.approx(size / 3, rel=0.15)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_one_sequence(world_size: int) -> None:
    mixture = Mixture([source("a", 10, 1.0), source("b", 7, 3.0)], seed=9)
    start = 17
    found = [
        draw
        for rank in range(world_size)
        for draw in islice(mixture.draws(start, rank=rank, world_size=world_size), 30 // world_size)
    ]
    wanted = [mixture.draw(position) for position in range(start, start + 30)]
    assert sorted(found, key=lambda draw: draw.position) == wanted


def test_every_rank_draws_from_every_source() -> None:
    # a schedule with a period would give rank 0 of 2 one source only
    mixture = Mixture([source("a", 10, 1.0), source("b", 10, 1.0)], seed=9)
    for rank in range(2):
        counts = names(list(islice(mixture.draws(rank=rank, world_size=2), 400)))
        assert 150 < counts["a"] < 250


def test_next_position_belongs_to_the_rank() -> None:
    for start in range(9):
        for rank in range(4):
            found = next_position(start, rank, 4)
            assert start <= found < start + 4
            assert found % 4 == rank


def test_the_record_is_the_one_drawn() -> None:
    mixture = Mixture([source("a", 10, 1.0), source("b", 7, 3.0)], seed=9)
    for draw in first(mixture, 20):
        assert mixture.record(draw).source == f"{draw.source_name}:{draw.index}"


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "at least one source"),
        ([source("a", 1), source("a", 2)], "two sources of a mixture are named 'a'"),
        ([source("a", 0)], "source 'a' has no records"),
        ([source("a", 1, 0.0)], "has weight 0.0"),
        ([source("a", 1, -1.0)], "has weight -1.0"),
        ([source("a", 1, float("inf"))], "has weight inf"),
        ([source("a", 1, 1.0, float("nan"))], "repeat nan"),
        ([source("a", 1, -1.0, -1.0)], "both must be 1e-06 or more"),
    ],
)
def test_impossible_mixtures_are_refused(sources: list[WeightedSource], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mixture(sources, seed=0)
