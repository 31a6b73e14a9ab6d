"""GSPO: the model answers questions, and answers better than their group's become more likely.

InternVL3.5 report, section on Cascade RL, second stage: group sequence policy optimisation (arXiv
2507.18071) without a reference model, on questions whose answers can be checked. A rollout batch
goes like this: ask questions, draw a group of answers to each from the model as it is, judge them,
note what the model thinks of every token, update the model a few times on mini-batches of whole
groups, and answer with the new weights from then on.

A rollout batch is the unit of resumption: checkpoints stand at its borders only, and one that was
begun is thrown away and made again, bit for bit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import nn

from cascadevl.data.stream import CollateConfig
from cascadevl.engine.packed_weights import pack
from cascadevl.engine.requests import EngineStats
from cascadevl.errors import ConfigError
from cascadevl.losses.gspo import grpo_loss, gspo_loss
from cascadevl.model.loading import load
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.sharding import wait_for_others
from cascadevl.model.v2pe import dynamic_limit
from cascadevl.scoring.rewards import Verifier, verifiers_of
from cascadevl.tasks.problems import Problems
from cascadevl.train.answer_batch import (
    TOKEN_SUMS,
    AnswerBatch,
    Plan,
    lay_out,
    nothing_learned,
    policy_logprobs,
    scored,
)
from cascadevl.train.gspo_config import GSPOConfig
from cascadevl.train.log import RunLog
from cascadevl.train.loop import TrainState, due, evaluate, largest, stop_requests, total, update
from cascadevl.train.objective import Objective, Terms
from cascadevl.train.optim import Optimiser, lr_factor, set_precision
from cascadevl.train.questions import Asked, Asker, QuestionStream, problems_of
from cascadevl.train.rollouts import Group, Sampler, compared, judge, opened_store, sums_of
from cascadevl.train.run import TrainResult, begin, export, open_log, saver, take_up
from cascadevl.train.sources import collate_config, example_builder
from cascadevl.train.start import make_trainable, start_from

LOSSES = {"sequence": gspo_loss, "token": grpo_loss}
"""The losses by the level at which a ratio is taken."""

WORK = ("rollout_tokens", "rollout_tiles")
"""What the engine computed for answers, counted beside what the updates went through."""

PARTS = ("rollout", "scoring", "old_logprobs", "update", "refresh")
"""What the time of a rollout batch is spent on."""


def gspo(
    config: GSPOConfig,
    *,
    problems: Problems | None = None,
    on_step: Callable[[TrainState[Any]], None] | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train a model by reinforcement on questions whose answers can be checked.

    Args:
        config: The run.
        problems: What is asked; the configured file or tasks if None.
        on_step: Called every ``run.eval_interval`` updates and at the end.
        console: Where progress is shown; standard error if None.

    Raises:
        ConfigError: If the configuration cannot be used.
        TrainingError: If the run breaks, or cannot be taken up again.
    """
    accelerator = begin(config.run.seed)
    if config.model.path is None:
        raise ConfigError("GSPO starts from a model that answers; name it with --model DIR")
    _check_shares(config, accelerator.num_processes)
    verifiers = verifiers_of(config.rewards)

    # The model, and the engine that answers with its weights.
    model, processor = start_from(config.model)
    set_precision(model, config.model.precision)
    packed = None if config.rollout.packed is None else pack(model, config.rollout.packed)
    speaker = None
    if config.model.shard is not None:  # a divided model cannot answer
        speaker, _ = load(config.model.path, dtype=config.model.dtype, device=accelerator.device)
    make_trainable(model, config.model, accelerator, lora=config.lora, seed=config.run.seed)
    sampler = Sampler(model, packed or speaker, processor, config.rollout)

    # The questions, in an order that resumes.
    limit = dynamic_limit(model.config)
    builder = example_builder(config.data, processor, config.run.seed, max_positions=limit)
    problems = problems_of(config.problems) if problems is None else problems
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    questions = QuestionStream(
        problems,
        Asker(builder, config),
        num_prompts=config.rollout.prompts,
        seed=config.run.seed,
        **share,
    )
    state: TrainState[Any] = TrainState(
        model=model,
        optimiser=Optimiser(model.named_parameters(), config.optim),
        stream=questions,
        accelerator=accelerator,
    )
    take_up(state, config)
    sampler.refresh()

    collate = collate_config(config.batch, processor, model.config)
    cycle = Cycle(config, state, model, sampler, verifiers, collate)
    save = saver(config)
    with (
        open_log("gspo", config, state, console) as log,
        opened_store(config, problems, **share) as store,
        stop_requests() as stop,
    ):
        while state.step < config.run.num_steps:
            begun_at, place = state.step, questions.state_dict()
            batch = cycle.roll_out(next(questions), stop)
            if batch is None:  # asked to stop before the first update: nothing has changed yet
                questions.load_state_dict(place)
            else:
                if store is not None:
                    store.append([group.rollout for group in batch.groups])
                cycle.learn(batch, log, on_step)
            is_last = state.step == config.run.num_steps
            stopping = total(accelerator, [float(stop.is_set())])[0] > 0
            if is_last or stopping or _crossed(begun_at, state.step, config):
                save(state)
            if stopping and not is_last:
                log.message(
                    f"stopped after step {state.step} of {config.run.num_steps}, everything is "
                    "saved; run the same command with --run.resume true to go on"
                )
                break
    finished = state.step == config.run.num_steps
    return export(state, model, processor, config, finished=finished)


@dataclass(frozen=True, slots=True, eq=False)
class RolloutBatch:
    """What a rollout batch gave, ready to be learned from.

    Attributes:
        groups: This process's groups.
        minibatches: How they are packed for every update.
        sums: Sums over this process's answers, and over their tokens, by name.
        seconds: What the time went to so far, by part.
        begun_s: When it began, on the clock of `time.perf_counter`.
    """

    groups: list[Group]
    minibatches: list[list[Plan]]
    sums: dict[str, float]
    seconds: dict[str, float]
    begun_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Cycle:
    """A rollout batch in two halves: answers are drawn, and learned from.

    Attributes:
        config: The run.
        state: Where it stands.
        model: The model in training; that of the state.
        sampler: Draws its answers.
        verifiers: What answers are judged by.
        collate: How rows become tensors.
    """

    config: GSPOConfig
    state: TrainState[Any]
    model: CascadeVLForConditionalGeneration
    sampler: Sampler
    verifiers: Mapping[str, Verifier]
    collate: CollateConfig

    def roll_out(self, asked: Sequence[Asked], stop: threading.Event) -> RolloutBatch | None:
        """Draw, judge and lay out; None if the run was asked to stop meanwhile."""
        config, state = self.config, self.state
        seconds, begun_s = dict.fromkeys(PARTS, 0.0), time.perf_counter()
        is_alone = state.accelerator.num_processes == 1  # several must stop in the same place
        before = self.sampler.stats()
        with _timed(seconds, "rollout"):
            self.model.train(False)
            drawn = self.sampler.draw(
                asked,
                seed=config.run.seed,
                step=state.step,
                should_stop=stop.is_set if is_alone else lambda: False,
            )
            self.model.train(True)
        stopping = total(state.accelerator, [float(drawn is None or stop.is_set())])[0] > 0
        if drawn is None or stopping:
            return None
        with _timed(seconds, "scoring"):
            rollouts = [
                judge(
                    one,
                    completions,
                    self.verifiers,
                    config.rewards,
                    max_tokens=config.rollout.max_answer_tokens,
                    weight_version=f"{config.run.out.name}, step {state.step}",
                )
                for one, completions in zip(asked, drawn, strict=True)
            ]
            groups = compared(asked, rollouts, drawn, config.policy, config.rewards)
        with _timed(seconds, "old_logprobs"):
            minibatches, sums = self._score(groups)
        sums |= sums_of(groups) | _work(before, self.sampler.stats())
        return RolloutBatch(groups, minibatches, sums, seconds, begun_s)

    def learn(
        self,
        batch: RolloutBatch,
        log: RunLog,
        on_step: Callable[[TrainState[Any]], None] | None,
    ) -> None:
        """Update the model on every mini-batch, and the engine in the end."""
        config, state = self.config, self.state
        num_answers = config.rollout.prompts // config.policy.updates * config.rollout.group
        objective = policy_objective(config, num_answers)
        for number, minibatch in enumerate(batch.minibatches, start=1):
            with _timed(batch.seconds, "update"):
                self._update(minibatch, objective, batch.groups[0])
            is_border = number == config.policy.updates
            if is_border:
                with _timed(batch.seconds, "refresh"):
                    self.sampler.refresh()
                state.metrics |= self._summary(batch)
            log.advance(state.step)
            if is_border or due(state.step, config.run.log_interval):
                log.write(state.step, state.metrics)
            is_last = state.step == config.run.num_steps
            if on_step and (is_last or due(state.step, config.run.eval_interval)):
                evaluate(state, on_step)

    def _score(self, groups: Sequence[Group]) -> tuple[list[list[Plan]], dict[str, float]]:
        """The batches of every update with their old log-probabilities, and sums over tokens."""
        size = len(groups) // self.config.policy.updates
        minibatches, sums = [], dict.fromkeys(TOKEN_SUMS, 0.0)
        for first in range(0, len(groups), size):
            with self.model.no_drop_path():
                done = scored(
                    self.model,
                    lay_out(groups[first : first + size], self.config.batch, self.collate),
                    self.collate,
                    temperature=self.config.rollout.temperature,
                    device=self.state.accelerator.device,
                )
            minibatches.append(done.plans)
            sums = {name: value + done.sums[name] for name, value in sums.items()}
        wait_for_others(self.model)
        return minibatches, sums

    def _update(
        self, minibatch: list[Plan], objective: Objective[AnswerBatch], group: Group
    ) -> None:
        """One update; none where all groups of all processes have equal rewards."""
        state = self.state
        num_batches = largest(state.accelerator, len(minibatch))
        factor = lr_factor(state.step, self.config.run.num_steps, state.optimiser.config)
        if num_batches:
            # Others have something to learn, and all must take part; in each batch of it, where
            # the model is divided.
            fewest = num_batches if state.optimiser.is_divided else 1
            if (missing := fewest - len(minibatch)) > 0:
                idle = nothing_learned(group, self.sampler.stop_token_id)
                minibatch = minibatch + [idle] * missing
            # Over the backward pass, too: checkpointed layers are computed again there.
            with self.model.no_drop_path():
                update(state, [plan.batch(self.collate) for plan in minibatch], objective)
            state.optimiser.step(factor)
            state.optimiser.zero_grad()
            num_learned = max(state.metrics.pop("learned"), 1.0)
            for name in ("clipped", "ratio"):
                state.metrics[name] /= num_learned
        else:
            state.metrics = {"loss": 0.0, "grad_norm": 0.0}
        state.step += 1
        state.metrics["lr"] = state.optimiser.config.lr * factor

    def _summary(self, batch: RolloutBatch) -> dict[str, float]:
        """Means over all answers and tokens of the batch on all processes, and its times."""
        elapsed_s = time.perf_counter() - batch.begun_s
        totals = total(self.state.accelerator, list(batch.sums.values()))
        sums = dict(zip(batch.sums, totals, strict=True))
        for name in WORK:
            self.state.counters[name] = self.state.counters.get(name, 0) + int(sums.pop(name))
        answers, tokens = sums.pop("answers"), sums.pop("tokens")
        means = {
            name: value / max(tokens if name in TOKEN_SUMS else answers, 1.0)
            for name, value in sums.items()
        }
        return {
            **means,
            **{f"{part}_s": spent for part, spent in batch.seconds.items()},
            "answers_per_s": answers / elapsed_s,
            "tokens_per_s": means["length_tokens"] * answers / elapsed_s,
        }


def policy_objective(config: GSPOConfig, num_answers: int) -> Objective[AnswerBatch]:
    """What an update minimises.

    Args:
        config: The run.
        num_answers: Answers of the update on all processes, those that need no forward included.
    """
    policy = config.policy

    def loss(model: nn.Module, batch: AnswerBatch, _: float) -> Terms:
        assert isinstance(model, CascadeVLForConditionalGeneration)
        terms = LOSSES[policy.level](
            policy_logprobs(model, batch.rows, config.rollout.temperature),
            batch.old_logprobs,
            batch.answer,
            batch.advantages,
            clip_low=policy.clip_low,
            clip_high=policy.clip_high,
            num_answers=num_answers,
        )
        is_learned = (batch.advantages != 0).to(terms.ratios.dtype)
        metrics = {
            "clipped": (terms.clipped * is_learned).sum(),
            "ratio": (terms.ratios * is_learned).sum(),
            "learned": is_learned.sum(),
        }
        return Terms(terms.loss, metrics)

    return Objective(weigh=lambda batch: float(len(batch.advantages)), loss=loss)


def _work(before: EngineStats, after: EngineStats) -> dict[str, float]:
    """Tokens and tiles that the engine has computed."""
    tokens = after.prompt_tokens + after.decoded_tokens
    return {
        "rollout_tokens": float(tokens - before.prompt_tokens - before.decoded_tokens),
        "rollout_tiles": float(after.encoded_tiles - before.encoded_tiles),
    }


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[part] += time.perf_counter() - start


def _check_shares(config: GSPOConfig, num_processes: int) -> None:
    shares = config.policy.updates * num_processes
    if config.rollout.prompts % shares:
        raise ConfigError(
            f"rollout.prompts is {config.rollout.prompts}, which {config.policy.updates} updates "
            f"of {num_processes} process(es) do not divide; use a multiple of {shares}"
        )


def _crossed(before: int, now: int, config: GSPOConfig) -> bool:
    """Whether a checkpoint fell due within a rollout batch."""
    interval = config.run.checkpoint_interval
    return interval > 0 and now // interval > before // interval
