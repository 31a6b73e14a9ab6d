"""How often each key may ask."""

from __future__ import annotations

import random

import pytest

from cascadevl.serving.rates import Rates


class Clock:
    """Shows what it is told to show."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_so_many_in_a_minute_and_then_as_many_as_have_become_old(clock: Clock):
    rates = Rates(3, clock)
    for second in (0, 10, 30):
        clock.now = 1000.0 + second
        assert rates.wait_s("ann") == 0
    clock.now = 1045.0
    assert rates.wait_s("ann") == 15
    clock.now = 1060.0
    assert rates.wait_s("ann") == 0  # the first one is a minute old
    assert rates.wait_s("ann") == 10  # until the second is


def test_each_key_counts_for_itself(clock: Clock):
    rates = Rates(1, clock)
    assert rates.wait_s("ann") == 0
    assert rates.wait_s("ann") == 60
    assert rates.wait_s("bob") == 0


def test_whoever_asks_too_early_does_not_wait_longer(clock: Clock):
    rates = Rates(2, clock)
    assert rates.wait_s("ann") == rates.wait_s("ann") == 0
    for second in range(1, 60):
        clock.now = 1000.0 + second
        assert rates.wait_s("ann") == 60 - second
    clock.now = 1060.0
    assert rates.wait_s("ann") == rates.wait_s("ann") == 0


def test_no_minute_has_more_and_nobody_waits_without_need(clock: Clock):
    rng, rates, taken = random.Random(0), Rates(5, clock), []
    for _ in range(2000):
        clock.now += rng.choice((0.0, 0.25, 1.0, 8.0, 30.0))
        num_within = sum(clock.now - then < 60 for then in taken)
        wait_s = rates.wait_s("ann")
        assert (wait_s == 0) == (num_within < 5)
        if wait_s == 0:
            taken.append(clock.now)
        else:
            free = clock.now + wait_s
            assert sum(free - then < 60 for then in taken) < 5
            assert sum(free - 0.125 - then < 60 for then in taken) == 5
