"""Who computes which tokens in the next step, and in which pages.

Plain Python over small records and arrays; no tensors. Answers are admitted in the order of their
arrival as pages become free, long prompts are read in chunks beside the answers that go on, and
where pages run out the youngest answer gives up its own and is computed again later. Since nobody
overtakes but those who wait for a beginning that another is just computing, every answer ends.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Int

from cascadevl.engine.cache import PagePool, page_keys
from cascadevl.engine.jobs import NO_LANE, Chunk, Job, Plan
from cascadevl.errors import RequestError

Limit: TypeAlias = Callable[[Job, int, int], int]
"""How far a chunk of a job that may reach from one token to another is to go in this step."""


class Scheduler:
    """The queue of answers, the pages they hold, and the plan of the next step."""

    def __init__(
        self,
        num_pages: int,
        page_tokens: int,
        *,
        max_running: int,
        max_step_tokens: int,
        prefix_cache: bool = True,
        fixed_chunk: int | None = None,
    ) -> None:
        """Begin with nothing to do.

        Args:
            num_pages: Pages there are.
            page_tokens: Tokens a page holds.
            max_running: Most jobs that hold pages.
            max_step_tokens: Most tokens of a step.
            prefix_cache: Whether pages of ended jobs are kept until their place is needed.
            fixed_chunk: Cut every prompt at multiples of this many tokens and compute every token
                of an answer alone, so that how a job is computed depends on the job alone.
        """
        self.pool = PagePool(num_pages)
        self.page_tokens = page_tokens
        self.max_step_tokens = max_step_tokens
        self.prefix_cache = prefix_cache
        self.fixed_chunk = fixed_chunk
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.table: Int[np.ndarray, "lanes pages"] = np.zeros((max_running, 16), dtype=np.int64)
        self.changes = 0  # counts changes of who runs, for those who derive something from it
        self._lanes = list(range(max_running))[::-1]
        self._tails: set[int] = set()  # lanes whose last page may be used by others too
        self._promised: dict[bytes, Job] = {}  # what is being computed

    def check_size(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Refuse what can never fit.

        Raises:
            RequestError: If even all pages do not hold the tokens, with both numbers.
        """
        needed = -(-(num_prompt_tokens + max_tokens - 1) // self.page_tokens)
        if needed > self.pool.num_pages:
            raise RequestError(
                f"the request needs {needed} pages of {self.page_tokens} tokens (a prompt of "
                f"{num_prompt_tokens} tokens and up to {max_tokens} new ones) but the engine has "
                f"{self.pool.num_pages}; shorten it, ask for fewer tokens, or give the engine more "
                f"cache_bytes"
            )

    def add(self, job: Job) -> None:
        """Queue a job that fits (`check_size`)."""
        insort(self.waiting, job, key=_order)

    def drop(self, job: Job) -> None:
        """Forget a job at once; what it has computed may serve others."""
        if job.is_running:
            self._release(job)
        elif job in self.waiting:
            self.waiting.remove(job)

    def forget(self) -> None:
        """Let no page be used again that was computed so far, for new weights.

        Running jobs are computed again from the beginning.
        """
        for job in list(self.running):
            self._give_up(job, keep=False)
        self.pool.forget()

    def plan(self, limit: Limit = lambda job, start, stop: stop) -> Plan:
        """The next step; `advance` or `abort` must follow before anything else is called.

        Args:
            limit: Asked once for every chunk, in the order in which they are planned.
        """
        plan = Plan()
        for job in list(self.running):
            if self._decodes(job) and job.is_running and len(plan.decodes) < self.max_step_tokens:
                self._decode(job, plan)
        if not plan.preempted:
            self._admit_waiting(self.max_step_tokens - len(plan.decodes))
        self._cut_chunks(plan, limit)
        return plan

    def advance(self, plan: Plan, tokens: Sequence[int]) -> None:
        """Take note that a step is done.

        Args:
            plan: The step.
            tokens: The new token of each of ``plan.sampled``.
        """
        for job in plan.decodes:
            job.computed += 1
        for chunk in plan.chunks:
            chunk.job.computed = chunk.stop
            if chunk.start < len(chunk.job.prompt):
                self._learn_prompt(chunk.job)
        for leader, job in plan.forks:
            self.pool.share(leader.pages)
            job.computed = leader.computed
            self._start(job, leader.pages)
            self._tails |= {leader.lane, job.lane}
        for job, token in zip(plan.sampled, tokens, strict=True):
            job.generated.append(token)

    def abort(self, plan: Plan) -> None:
        """Undo a step that did not come to its end: its jobs are computed again."""
        jobs = [*plan.decodes, *(chunk.job for chunk in plan.chunks)]
        for job in jobs:
            if job.is_running:
                self._give_up(job, keep=False)
        for leader, job in plan.forks:
            leader.siblings = (*leader.siblings, job.sample)

    def check(self) -> None:
        """Assert that no page is lost or used unknown to the pool."""
        self.pool.check([job.pages for job in self.running])
        assert all(not job.pages for job in self.waiting)
        assert len({job.lane for job in self.running}) == len(self.running)
        for job in self.running:
            assert self.table[job.lane, : len(job.pages)].tolist() == job.pages

    def _decodes(self, job: Job) -> bool:
        if job.computed < len(job.prompt.ids):
            return False
        return self.fixed_chunk is not None or job.computed == job.num_tokens - 1

    def _decode(self, job: Job, plan: Plan) -> None:
        """Plan one more token, if a page for it can be had."""
        place = job.computed // self.page_tokens
        if place == len(job.pages) or job.lane in self._tails:
            while not self._make_writable(job, place, plan):
                youngest = self.running[-1]
                self._give_up(youngest, keep=True)
                plan.preempted += 1
                if youngest is job:
                    return
        if job.computed == job.num_tokens - 1:
            plan.sampled.append(job)
            plan.rows.append(len(plan.decodes))
        plan.decodes.append(job)

    def _make_writable(self, job: Job, place: int, plan: Plan) -> bool:
        """Give a job a page of its own for its next token; False if there is none."""
        is_new = place == len(job.pages)
        if not is_new and self.pool.references(job.pages[place]) == 1:
            self._tails.discard(job.lane)
            return True
        left = job.max_tokens - len(job.generated)
        room = left // self.page_tokens + 1
        after = job.pages[-1] if is_new and job.pages else None
        pages = self.pool.allocate(1, after=after, room=room)
        if pages is None:
            return False
        self._tails.discard(job.lane)
        if is_new:
            self._give_pages(job, pages)
        else:
            shared, job.pages[place] = job.pages[place], pages[0]
            self.table[job.lane, place] = pages[0]
            plan.copies.append((shared, pages[0]))
            self.pool.release([shared])
            self.changes += 1
        return True

    def _admit_waiting(self, budget: int) -> None:
        backlog = sum(
            job.num_tokens - job.computed for job in self.running if not self._decodes(job)
        )
        number = 0
        while number < len(self.waiting) and self._lanes and backlog < budget:
            job = self.waiting[number]
            known = self._known_pages(job)
            if len(known) < len(job.keys) and job.keys[len(known)] in self._promised:
                number += 1  # another job is computing this one's beginning: wait for it
            elif self._admit(job, known):
                self.waiting.pop(number)
                backlog += job.num_tokens - job.computed
            else:
                return

    def _known_pages(self, job: Job) -> tuple[int, ...]:
        """Pages that a waiting job need not compute; its last token is always computed."""
        if not self.prefix_cache:
            return ()
        usable = (job.num_tokens - 1) // self.page_tokens
        keys = job.keys
        if job.generated and self.fixed_chunk is None:
            keys = page_keys(job.prompt.followed_by(job.generated), self.page_tokens, keys)
        known = self.pool.find(keys[:usable])
        if self.fixed_chunk is None:
            return known
        whole = min(len(known) * self.page_tokens, len(job.prompt) - 1)
        return known[: whole // self.fixed_chunk * self.fixed_chunk // self.page_tokens]

    def _admit(self, job: Job, known: tuple[int, ...]) -> bool:
        """Give a job pages for all its tokens; False if there are too few."""
        count = -(-job.num_tokens // self.page_tokens) - len(known)
        spare = self.pool.num_free - sum(map(self.pool.is_idle, known))
        if self.running and spare < count + len(self.running):
            return False  # those who run would soon have to take the pages away again
        if spare < count:
            return False
        self.pool.share(known)
        left = job.max_tokens - len(job.generated)
        pages = self.pool.allocate(count, room=count + left // self.page_tokens + 1)
        assert pages is not None, "free pages were counted"
        job.computed = len(known) * self.page_tokens
        if job.cached is None:
            job.cached = min(job.computed, len(job.prompt))
        self._start(job, [*known, *pages])
        if self.prefix_cache:
            for key in job.keys[len(known) :]:
                self._promised.setdefault(key, job)
        return True

    def _cut_chunks(self, plan: Plan, limit: Limit) -> None:
        """Fill the step with prompts, those there first first."""
        row, lanes = len(plan.decodes), len(self._lanes)
        if row == len(self.running):
            return  # none is reading its prompt
        for job in self.running:
            if self._decodes(job):
                continue
            stop = self._chunk_end(job, self.max_step_tokens - row, is_first=row == 0)
            stop = limit(job, job.computed, stop) if stop > job.computed else stop
            if stop <= job.computed:
                continue
            plan.chunks.append(Chunk(job, job.computed, stop))
            row += stop - job.computed
            if stop == job.num_tokens:
                plan.sampled.append(job)
                plan.rows.append(row - 1)
                lanes -= self._fork(job, plan, lanes, row - 1)

    def _chunk_end(self, job: Job, budget: int, *, is_first: bool) -> int:
        """Where the next chunk of a job ends; at its beginning where the step has no room."""
        if self.fixed_chunk is None:
            return min(job.num_tokens, job.computed + budget)
        stop = (job.computed // self.fixed_chunk + 1) * self.fixed_chunk
        stop = min(len(job.prompt.ids), stop)
        return stop if is_first or stop - job.computed <= budget else job.computed

    def _fork(self, leader: Job, plan: Plan, lanes: int, row: int) -> int:
        """Begin the other samples of a prompt that is read; those without a lane wait."""
        new = [
            Job(
                leader.arrival,
                sample,
                leader.prompt,
                leader.keys,
                leader.max_tokens,
                cached=len(leader.prompt),
            )
            for sample in leader.siblings
        ]
        leader.siblings = ()
        for job in new[:lanes]:
            plan.forks.append((leader, job))
            plan.sampled.append(job)
            plan.rows.append(row)
        for job in new[lanes:]:
            job.cached = None
            self.add(job)
        return len(new[:lanes])

    def _start(self, job: Job, pages: Sequence[int]) -> None:
        job.lane = self._lanes.pop()
        self._give_pages(job, pages)
        insort(self.running, job, key=_order)
        self.changes += 1

    def _give_pages(self, job: Job, pages: Sequence[int]) -> None:
        start, stop = len(job.pages), len(job.pages) + len(pages)
        job.pages.extend(pages)
        while stop > self.table.shape[1]:
            self.table = np.pad(self.table, ((0, 0), (0, self.table.shape[1])))
        self.table[job.lane, start:stop] = pages

    def _give_up(self, job: Job, *, keep: bool) -> None:
        """Take a job's pages away; it waits to be computed again."""
        self._release(job, keep=keep)
        self.add(job)

    def _release(self, job: Job, *, keep: bool = True) -> None:
        self._break_promises(job)
        if keep and self.prefix_cache:
            self._learn_answer(job)
        self.pool.release(job.pages)
        self._tails.discard(job.lane)
        self._lanes.append(job.lane)
        self.running.remove(job)
        job.pages, job.computed, job.lane = [], 0, NO_LANE
        self.changes += 1

    def _break_promises(self, job: Job) -> None:
        for key in job.keys:
            if self._promised.get(key) is job:
                del self._promised[key]

    def _learn_prompt(self, job: Job) -> None:
        if not self.prefix_cache:
            return
        full = min(job.computed // self.page_tokens, len(job.keys))
        for page, key in zip(job.pages[:full], job.keys, strict=False):
            self.pool.learn(page, key)
            if self._promised.get(key) is job:
                del self._promised[key]

    def _learn_answer(self, job: Job) -> None:
        """Let a next turn find the pages of an answer."""
        full = job.computed // self.page_tokens
        if self.fixed_chunk is not None or full <= len(job.keys):
            return
        said = job.prompt.followed_by(job.generated)
        keys = page_keys(said, self.page_tokens, job.keys)
        for page, key in zip(job.pages[:full], keys, strict=False):
            self.pool.learn(page, key)


def _order(job: Job) -> tuple[int, int]:
    return job.order
