"""The scheduler against a memory of plain lists: everything read was written, nobody is lost.

The simulated memory notes for every place of a page which tokens, from the first of the sequence
on, had led there when it was written. Before a token is computed, all places before it must hold
just what its own sequence says.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cascadevl.engine.cache import PromptTokens, page_keys
from cascadevl.engine.jobs import Job, Plan
from cascadevl.engine.scheduler import Scheduler
from cascadevl.errors import RequestError

PAGE = 2


def tokens_of(job: Job) -> list[int]:
    return [*job.prompt.ids.tolist(), *job.generated]


class Simulation:
    """A scheduler, the memory it plans for, and a made-up model."""

    def __init__(self, num_pages: int, **settings: object) -> None:
        values = {"max_running": 4, "max_step_tokens": 6} | settings
        self.scheduler = Scheduler(num_pages, PAGE, **values)
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}
        self.ended: dict[tuple[int, int], list[int]] = {}
        self.jobs: dict[tuple[int, int], Job] = {}
        self.arrivals = 0
        self.computed: list[int] = []  # tokens of every step

    def add(self, ids: list[int], max_tokens: int, samples: int = 1) -> None:
        self.scheduler.check_size(len(ids), max_tokens)
        positions = np.arange(len(ids), dtype=np.float32)
        prompt = PromptTokens(np.array(ids, dtype=np.int64), positions)
        keys = page_keys(prompt, PAGE)
        siblings = tuple(range(1, samples))
        job = Job(self.arrivals, 0, prompt, keys, max_tokens, siblings)
        self.scheduler.add(job)
        self.jobs[job.order] = job
        self.arrivals += 1

    def write(self, job: Job, place: int) -> None:
        known = tokens_of(job)
        for before in range(place):
            page = job.pages[before // PAGE]
            assert self.memory[page, before % PAGE] == tuple(known[: before + 1])
        page = job.pages[place // PAGE]
        assert self.scheduler.pool.references(page) == 1, "written into a page of others"
        self.memory[page, place % PAGE] = tuple(known[: place + 1])

    def compute(self, plan: Plan) -> list[int]:
        before = dict(self.memory)
        for source, target in plan.copies:
            for offset in range(PAGE):
                self.memory.pop((target, offset), None)
                if (source, offset) in before:
                    self.memory[target, offset] = before[source, offset]
        for job in plan.decodes:
            self.write(job, job.computed)
        for chunk in plan.chunks:
            for place in range(chunk.start, chunk.stop):
                self.write(chunk.job, place)
        self.computed.append(plan.num_tokens)
        # the made-up model: what comes next is a function of all that was said, and of the sample
        return [hash((*tokens_of(job), job.sample)) % 3 for job in plan.sampled]

    def step(self) -> None:
        plan = self.scheduler.plan()
        starts = np.cumsum([0] + [1] * len(plan.decodes) + [c.stop - c.start for c in plan.chunks])
        ends = dict(zip([id(j) for j in plan.decodes], starts[1:] - 1, strict=False))
        ends |= {
            id(c.job): e
            for c, e in zip(plan.chunks, starts[len(plan.decodes) + 1 :] - 1, strict=True)
        }
        parents = {id(job): leader for leader, job in plan.forks}
        for job, row in zip(plan.sampled, plan.rows, strict=True):
            assert row == ends[id(parents.get(id(job), job))]
        self.scheduler.advance(plan, self.compute(plan))
        for job in plan.sampled:
            self.jobs[job.order] = job
            if len(job.generated) == job.max_tokens:
                self.ended[job.order] = job.generated
                self.drop(job)

    def drop(self, job: Job) -> None:
        self.scheduler.drop(job)
        del self.jobs[job.order]

    def run(self, most: int = 1000) -> None:
        for _ in range(most):
            if not self.scheduler.running and not self.scheduler.waiting:
                return
            self.step()
            self.scheduler.check()
        raise AssertionError("somebody waits for ever")


def alone(ids: list[int], max_tokens: int, sample: int) -> list[int]:
    said: list[int] = []
    for _ in range(max_tokens):
        said.append(hash((*ids, *said, sample)) % 3)
    return said


class Schedule(RuleBasedStateMachine):
    """Any mix of requests, cancels, interrupted steps and new weights."""

    @initialize(
        num_pages=st.integers(6, 12),
        max_running=st.integers(1, 4),
        max_step_tokens=st.integers(2, 9),
        prefix_cache=st.booleans(),
        fixed_chunk=st.sampled_from([None, None, 2, 4]),
    )
    def begin(self, num_pages: int, **settings: object) -> None:
        self.simulation = Simulation(num_pages, **settings)
        self.wanted: dict[tuple[int, int], list[int]] = {}

    @rule(
        ids=st.lists(st.integers(0, 1), min_size=1, max_size=7),
        max_tokens=st.integers(1, 5),
        samples=st.integers(1, 3),
    )
    def add(self, ids: list[int], max_tokens: int, samples: int) -> None:
        arrival = self.simulation.arrivals
        self.simulation.add(ids, max_tokens, samples)
        for sample in range(samples):
            self.wanted[arrival, sample] = alone(ids, max_tokens, sample)

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.simulation.step()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        scheduler = self.simulation.scheduler
        jobs = [*scheduler.running, *scheduler.waiting]
        if not jobs:
            return
        arrival = data.draw(st.sampled_from(sorted({job.arrival for job in jobs})))
        for job in jobs:
            if job.arrival == arrival:
                job.siblings = ()
                scheduler.drop(job)
        for order in list(self.wanted):
            if order[0] == arrival and order not in self.simulation.ended:
                del self.wanted[order]

    @rule()
    def interrupt(self) -> None:
        """A step stops halfway: nothing of it counts, whatever it has written."""
        plan = self.simulation.scheduler.plan()
        for job in plan.decodes:
            self.simulation.memory[job.pages[job.computed // PAGE], job.computed % PAGE] = (9,)
        self.simulation.scheduler.abort(plan)

    @rule()
    def forget(self) -> None:
        self.simulation.scheduler.forget()
        self.simulation.memory.clear()

    @precondition(lambda self: len(self.wanted) > 3)
    @rule()
    def finish(self) -> None:
        self.simulation.run()

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.run()
            pool = self.simulation.scheduler.pool
            assert pool.num_free == pool.num_pages
            assert self.simulation.ended == self.wanted


TestSchedule = Schedule.TestCase
TestSchedule.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def test_a_group_reads_its_prompt_once_and_shares_its_pages() -> None:
    simulation = Simulation(40, max_running=8)
    simulation.add([1, 0, 1, 1, 0], 3, samples=4)
    simulation.step()
    scheduler = simulation.scheduler
    assert simulation.computed == [5]
    assert [job.generated != [] for job in scheduler.running] == [True] * 4
    assert len({tuple(job.pages) for job in scheduler.running}) == 1
    simulation.step()  # the shared page in which the prompt ends is copied for all but one
    first, second, third = ({job.pages[i] for job in scheduler.running} for i in range(3))
    assert (len(first), len(second), len(third)) == (1, 1, 4)
    simulation.run()
    assert sum(simulation.computed) == 5 + 4 * 2


def test_a_long_prompt_is_read_in_chunks_while_others_go_on() -> None:
    simulation = Simulation(40)
    simulation.add([1, 1], 12)
    simulation.step()
    simulation.add([0] * 17, 2)
    for _ in range(4):
        simulation.step()
    assert simulation.computed == [2, 6, 6, 6, 3]
    assert len(simulation.jobs[0, 0].generated) == 5
    assert len(simulation.jobs[1, 0].generated) == 1


def test_the_youngest_gives_way_and_is_answered_in_the_end() -> None:
    simulation = Simulation(6, prefix_cache=False)
    simulation.add([1, 1, 1], 8)
    simulation.add([0, 0, 0], 8)
    while not simulation.ended:
        simulation.step()
        assert simulation.scheduler.running[:1] in ([], [simulation.jobs.get((0, 0))])
    assert list(simulation.ended) == [(0, 0)]
    simulation.run()
    assert simulation.ended == {
        (0, 0): alone([1, 1, 1], 8, 0),
        (1, 0): alone([0, 0, 0], 8, 0),
    }


def test_those_who_begin_alike_at_once_wait_for_the_first_and_share_its_pages() -> None:
    simulation = Simulation(40, max_step_tokens=20)
    for end in range(3):
        simulation.add([1, 0, 1, 1, 0, 1, end], 2)
    simulation.run()
    assert simulation.computed[:2] == [7, 1 + 1 + 1]


def test_a_next_turn_computes_only_what_is_new() -> None:
    simulation = Simulation(40)
    simulation.add([1, 0, 1], 4)
    simulation.run()
    said = simulation.ended[0, 0]
    simulation.computed.clear()
    simulation.add([1, 0, 1, *said, 1], 1)
    simulation.run()
    assert simulation.computed == [2]  # the last page of the answer was not full


def test_a_request_that_can_never_fit_is_refused_with_both_numbers() -> None:
    scheduler = Scheduler(6, PAGE, max_running=2, max_step_tokens=4)
    scheduler.check_size(5, 8)
    with pytest.raises(RequestError, match=r"needs 7 pages .* 5 tokens .* 9 new .* has 6"):
        scheduler.check_size(5, 9)


def test_a_limit_holds_a_chunk_back_but_not_those_behind_it() -> None:
    simulation = Simulation(40, max_step_tokens=20)
    simulation.add([1] * 5, 1)
    simulation.add([0] * 5, 1)
    plan = simulation.scheduler.plan(lambda job, start, stop: start + 1 if job.arrival else start)
    assert [(c.job.arrival, c.start, c.stop) for c in plan.chunks] == [(1, 0, 1)]
