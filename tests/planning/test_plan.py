"""Plans: which arrangement, how many processors for which half, and what does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cascadevl.errors import ConfigError
from cascadevl.model.zoo import config_for
from cascadevl.planning.counts import count
from cascadevl.planning.hardware import HARDWARE
from cascadevl.planning.plan import Site, balance, make_plan, smallest_group
from cascadevl.planning.service import Question
from cascadevl.planning.simulation import Load

COUNTS = count(config_for("InternVL3.5-38B"))
SITE = Site(hardware=HARDWARE["a100"], processors=6, group=2, compute_share=0.4)
QUESTION = Question(tiles=5)
LOAD = Load(rate=1.0, num_requests=40)


def test_a_plan_has_the_three_arrangements_with_equally_many_processors():
    plan = make_plan(COUNTS, QUESTION, SITE, LOAD)
    coupled, apart, routed = plan.options
    assert [each.name for each in plan.options] == ["coupled", "DvD", "DvD + router"]
    assert {each.processors for each in plan.options} == {6}
    assert coupled.layout.vision == 0
    assert routed.capacity_per_s > 1.1 * apart.capacity_per_s
    assert routed.processor_s == pytest.approx(6 / routed.capacity_per_s)


def test_processors_go_where_the_work_is():
    """A longer answer moves them to the language half, a router to the vision half."""
    ratio = balance(COUNTS, QUESTION, SITE)
    # Operations: 5 tiles against 1280 + 64 + 32 tokens of the language model.
    tokens = 1280 + 64 + 31
    expected = 5 * COUNTS.tile_flops / (tokens * COUNTS.token_flops)
    assert ratio == pytest.approx(expected, rel=0.1)
    assert balance(COUNTS, replace(QUESTION, new_tokens=512), SITE) < 0.8 * ratio
    assert balance(COUNTS, replace(QUESTION, compressed_share=1.0), SITE) > 2 * ratio
    assert balance(COUNTS, Question(tiles=0), SITE) == 0.0


def test_the_best_layout_is_next_to_the_balance():
    site = replace(SITE, processors=12)
    plan = make_plan(COUNTS, QUESTION, site, LOAD)
    layout = plan.options[1].layout
    assert layout.vision + 2 * layout.language == 12
    share = layout.vision / 12
    assert share == pytest.approx(plan.ratio / (1 + plan.ratio), abs=2 / 12)


def test_processors_for_a_rate_are_whole_sites():
    option = make_plan(COUNTS, QUESTION, SITE, LOAD).options[0]
    capacity = option.capacity_per_s
    assert option.processors_for(0.5 * capacity) == 6
    assert option.processors_for(2.5 * capacity) == 18


def test_without_pictures_there_is_nothing_to_decouple():
    plan = make_plan(COUNTS, Question(tiles=0), SITE, LOAD)
    assert [each.name for each in plan.options] == ["coupled"]


def test_the_smallest_group_holds_the_model():
    assert smallest_group(COUNTS, HARDWARE["a100"]) == 2
    assert smallest_group(COUNTS, HARDWARE["h200"]) == 1
    assert smallest_group(count(config_for("InternVL3.5-241B-A28B")), HARDWARE["a100"]) == 8


def test_what_does_not_fit_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match="a group of 2 holds it"):
        make_plan(COUNTS, QUESTION, replace(SITE, group=1), LOAD)
    with pytest.raises(ConfigError, match="there are 6"):
        make_plan(COUNTS, QUESTION, replace(SITE, group=8), LOAD)
