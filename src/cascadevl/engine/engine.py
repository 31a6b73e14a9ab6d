"""One engine for chat, servers, rollouts and evaluation: requests in, tokens out, step by step.

A request travels so: `prompts.prepare` expands it; if a router is to decide how many tokens its
tiles get, it waits in `Routes` until they are encoded; the `Scheduler` gives it pages and plans
which of its tokens are computed when; the `VisionCache` makes its visual tokens; the `Runner`
computes the step for all running answers at once; `sample` chooses their next tokens; and an
`AnswerState` sees when an answer has ended. docs/concepts/engine.md tells it in full.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.answers import AnswerState, OpenRequest, answer_state, token_logprobs
from cascadevl.engine.boxes import Boxes, TokenStream
from cascadevl.engine.choosing import Chooser
from cascadevl.engine.jobs import Job, Plan
from cascadevl.engine.packed_weights import PackedModel
from cascadevl.engine.prompts import Tile, prepare, tiles_of
from cascadevl.engine.requests import (
    Completion,
    EngineConfig,
    EngineStats,
    Request,
    StepResult,
    TokenOutput,
)
from cascadevl.engine.routes import Routes
from cascadevl.engine.runner import Runner, page_bytes
from cascadevl.engine.scheduler import Scheduler
from cascadevl.engine.vision import VisionCache
from cascadevl.engine.weights import evaluating, load_weights
from cascadevl.errors import LogitsError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration

_FIXED_CHUNK = 256
"""Tokens of a prompt computed at once where each is to be computed with the same operations."""


class Engine:
    """Answers many requests at once with one model.

    `step` may run in one thread while others call `add` and `cancel`; nothing else is to be called
    from several threads.
    """

    def __init__(
        self,
        model: CascadeVLForConditionalGeneration | PackedModel,
        processor: CascadeVLProcessor | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        """Reserve pages for a model.

        Args:
            model: Answers; or its packed form, from `cascadevl.engine.packed_weights.pack`. Its
                weights may change only by `load`.
            processor: Makes text of tokens and knows the template's stop tokens; without it
                answers are tokens alone.
            config: How much may be held and done at once.
        """
        self._packed = model if isinstance(model, PackedModel) else None
        model = model.model if isinstance(model, PackedModel) else model
        self.model, self.processor = model, processor
        self.config = config = config or EngineConfig()
        num_pages = config.num_pages
        if num_pages is None:
            num_pages = max(1, config.cache_bytes // page_bytes(model, config.page_tokens))
        chunk = config.page_tokens * max(1, _FIXED_CHUNK // config.page_tokens)
        fixed_chunk = chunk if config.batch_invariant else None
        self._scheduler = Scheduler(
            num_pages,
            config.page_tokens,
            max_running=config.max_running,
            max_step_tokens=config.max_step_tokens,
            prefix_cache=config.prefix_cache,
            fixed_chunk=fixed_chunk,
        )
        self._runner = Runner(model, num_pages, config.page_tokens, fixed_chunk=fixed_chunk)
        self._vision = VisionCache(
            model, config.feature_bytes, batch_invariant=config.batch_invariant
        )
        self._routes = Routes(self._vision)
        self._chooser = Chooser(model, processor)
        self._open: dict[int, OpenRequest] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # held while a step is computed
        self._inbox: deque[OpenRequest | int] = deque()  # what came meanwhile: new, or called off
        self._cancelled: list[AnswerState] = []  # not reported yet
        self._boxes = Boxes(self)
        self._counts = dict.fromkeys(("steps", "prompt", "cached", "decoded", "preempted"), 0)

    def add(self, request: Request) -> int:
        """Queue a request.

        Args:
            request: What is asked.

        Returns:
            Its number, ascending.

        Raises:
            RequestError: If it can never be answered: it does not fit the trained context or the
                pages there are, even with all tiles that a router might keep full, or does not
                fit the model.
        """
        prompt = prepare(request, self.model.config)
        self._scheduler.check_size(len(prompt.tokens), request.sampling.max_tokens)
        self._chooser.check(request)
        asked = OpenRequest(next(self._numbers), request, prompt, request.num_samples)
        self._open[asked.number] = asked
        self._inbox.append(asked)
        return asked.number

    def opened(self, request_id: int) -> OpenRequest:
        """What is known of a request that is not answered yet; it is kept up to date."""
        return self._open[request_id]

    def cancel(self, request_id: int) -> None:
        """Call a request off; what it holds is free at once, or after the step being computed.

        Answers that have not ended are reported as ``cancelled`` by the next step. A number that
        is not known, or has been answered, is ignored.

        Args:
            request_id: From `add`.
        """
        self._inbox.append(request_id)
        if self._lock.acquire(blocking=False):
            try:
                self._take_in()
            finally:
                self._lock.release()

    def step(self) -> StepResult:
        """Compute one step of all answers that run; nothing if there are none.

        Raises:
            LogitsError: If logits are not finite. The answers they belong to are given up, the
                others go on with the next step.
        """
        with self._lock, evaluating(self.model):
            self._take_in()
            most = max(1, self.config.max_step_tiles - self._route())  # nobody waits forever
            plan = self._scheduler.plan(self._vision.limit(self._tiles, most))
            self._counts["preempted"] += plan.preempted
            states = self._compute(plan) if plan.num_tokens else []
            result = self._report(states)
        self._boxes.deliver(result)
        return result

    @property
    def is_packed(self) -> bool:
        """Whether the text body was packed for a CPU, and its weights are no longer as stored."""
        return self._packed is not None

    @property
    def num_waiting(self) -> int:
        """Answers that wait for their turn, preempted ones included."""
        added = sum(isinstance(each, OpenRequest) for each in self._inbox)
        return len(self._scheduler.waiting) + len(self._routes) + added

    @property
    def is_idle(self) -> bool:
        """Whether a step would bring nothing."""
        scheduler = self._scheduler
        waits = scheduler.waiting or self._routes or self._inbox
        return not (scheduler.running or waits or self._cancelled)

    def generate(self, requests: Iterable[Request]) -> list[tuple[Completion, ...]]:
        """All answers of all requests, in order.

        Args:
            requests: Taken as there is room for them.

        Raises:
            RequestError: If one can never be answered; those before it are called off.
        """
        return self._boxes.generate(requests)

    def stream(self, request: Request) -> TokenStream:
        """The tokens of a request as they come; closing the stream calls the request off.

        Args:
            request: What is asked; every token is reported, whether ``stream`` is set or not.

        Raises:
            RequestError: If it can never be answered.
        """
        return self._boxes.stream(request)

    def astream(self, request: Request) -> AsyncIterator[TokenOutput]:
        """The same for asyncio: steps are computed in a thread, for all who wait at once.

        Args:
            request: What is asked.

        Raises:
            RequestError: If it can never be answered.
        """
        return self._boxes.astream(request)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take in new weights, in place; nothing computed with the old ones is used again.

        Running answers keep the tokens they have and go on with the new weights.

        Args:
            state: Tensors by the names of the model's ``state_dict``; a tied head may be absent.

        Raises:
            CheckpointError: If names or shapes differ from the model's; then nothing has changed.
        """
        with self._lock:
            if self._packed is not None:
                self._packed.refresh(state)
            else:
                load_weights(self.model, state)
            self._forget()

    def visual_tokens(
        self, tiles: UInt8[np.ndarray, "tiles px px 3"]
    ) -> Float[Tensor, "visual hidden"]:
        """Visual tokens of tiles, all full, one tile behind the other.

        What was encoded for a request is found again, so that a judge with the same vision half
        need not look at a picture a second time. Waits for a step that is being computed.

        Args:
            tiles: RGB tiles as `cascadevl.types.Example` holds them.

        Raises:
            RequestError: If they do not have the model's size.
        """
        with self._lock, evaluating(self.model):
            placed = tiles_of(tiles, self.model.config)
            return torch.cat(self._vision.features(placed))

    def forget(self) -> None:
        """Find nothing again of what was computed for requests that have ended.

        An idle engine then answers as a new one does, to the bit.
        """
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._scheduler.forget()
        self._vision.forget()
        self._routes.forget()

    def stats(self) -> EngineStats:
        """What is held, and has been done so far."""
        scheduler, counts = self._scheduler, self._counts
        return EngineStats(
            waiting=self.num_waiting,
            running=len(scheduler.running),
            pages=scheduler.pool.num_pages,
            free_pages=scheduler.pool.num_free,
            steps=counts["steps"],
            prompt_tokens=counts["prompt"],
            cached_tokens=counts["cached"],
            decoded_tokens=counts["decoded"],
            preemptions=counts["preempted"],
            encoded_tiles=self._vision.num_encoded,
            cached_tiles=self._vision.num_found,
        )

    def check(self) -> None:
        """Assert that no page is lost and nothing is held for answers that have ended."""
        with self._lock:
            self._scheduler.check()
            held = sum(
                state.row >= 0 for each in self._open.values() for state in each.states.values()
            )
            assert held == len(self._chooser), "a row of wishes is held by nobody"

    def _take_in(self) -> None:
        """Take note of what was added and called off."""
        while self._inbox:
            each = self._inbox.popleft()
            if isinstance(each, OpenRequest) and each.prompt.unrouted is not None:
                self._routes.add(each)
            elif isinstance(each, OpenRequest):
                self._scheduler.add(each.leader(self.config.page_tokens))
            elif each in self._open:
                self._call_off(self._open[each])

    def _route(self) -> int:
        """Let the router decide on requests whose turn it is; how many tiles were encoded."""
        waiting = self._scheduler.waiting
        ready, encoded = self._routes.advance(
            self.config.max_step_tiles, before=waiting[0].arrival if waiting else None
        )
        for asked in ready:
            self._scheduler.add(asked.leader(self.config.page_tokens))
        return encoded

    def _call_off(self, asked: OpenRequest) -> None:
        scheduler = self._scheduler
        if self._routes.drop(asked):
            scheduler.add(asked.leader(self.config.page_tokens))  # to be taken off like all others
        jobs = [
            job for job in (*scheduler.running, *scheduler.waiting) if job.arrival == asked.number
        ]
        for job in jobs:
            unborn = [asked.job(number) for number in job.siblings]
            scheduler.drop(job)
            for each in (job, *unborn):
                state = self._state(each)
                state.call_off()
                self._cancelled.append(state)
                self._close(state)

    def _tiles(self, job: Job) -> Sequence[Tile]:
        return self._open[job.arrival].prompt.tiles

    def _state(self, job: Job) -> AnswerState:
        """What is known of the answer that a job computes."""
        asked = self._open[job.arrival]
        state = asked.states.get(job.sample)
        if state is None:
            state = answer_state(job, asked.request, asked.prompt, self.model, self.processor)
            asked.states[job.sample] = state
        state.job = job  # a fork that was taken back came again as another job
        return state

    def _close(self, state: AnswerState) -> None:
        """Give back what an ended answer holds beside its pages."""
        self._chooser.release(state)
        self._counts["cached"] += state.job.cached or 0
        asked = self._open[state.job.arrival]
        asked.num_left -= 1
        if not asked.num_left:
            del self._open[asked.number]

    def _compute(self, plan: Plan) -> list[AnswerState]:
        """Carry a plan out; the answers that got a token."""
        try:
            visual = self._vision.of_chunks(plan.chunks, self._tiles)
            logits = self._runner.run(plan, self._scheduler.table, visual, self._scheduler.changes)
            states = [self._state(job) for job in plan.sampled]
            sampled = self._chooser.choose(logits, states)
        except LogitsError as error:
            self._scheduler.abort(plan)
            self._give_up(plan, error.places)
            raise
        except BaseException:  # also Ctrl-C: a step counts as a whole or not at all
            self._scheduler.abort(plan)
            raise
        self._scheduler.advance(plan, sampled.tokens.tolist())
        self._count(plan)
        for place, state in enumerate(states):
            has_logprobs = state.request.sampling.logprobs is not None
            state.take(token_logprobs(sampled, place) if has_logprobs else None)
        return states

    def _give_up(self, plan: Plan, places: Sequence[int]) -> None:
        for place in places:
            job = plan.sampled[place]
            if job.arrival in self._open:
                self._call_off(self._open[job.arrival])

    def _report(self, states: Sequence[AnswerState]) -> StepResult:
        """Outputs of the step, and the ends of answers that were called off before."""
        tokens = [state.output() for state in states if state.request.stream]
        ended = [state for state in states if state.finish_reason is not None]
        for state in ended:
            self._scheduler.drop(state.job)
            self._close(state)
        called_off, self._cancelled = self._cancelled, []
        tokens += [state.cancelled() for state in called_off if state.request.stream]
        completions = tuple(state.completion() for state in (*ended, *called_off))
        return StepResult(tuple(tokens), completions)

    def _count(self, plan: Plan) -> None:
        counts = self._counts
        counts["steps"] += 1
        counts["decoded"] += len(plan.sampled)
        counts["prompt"] += sum(
            min(chunk.stop, len(chunk.job.prompt)) - min(chunk.start, len(chunk.job.prompt))
            for chunk in plan.chunks
        )
