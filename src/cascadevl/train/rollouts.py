"""Answers of the model in training: drawn by the engine, judged, and compared with their group.

The engine answers the very `Example` that is trained on afterwards, so that both see one prompt
and one tiling (design decision 11), and gives the very tokens. Draws are a function of (seed, step,
question), so a rollout batch that was thrown away is made again exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from cascadevl.data.permutation import named_key
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.rollouts import RolloutStore, open_store
from cascadevl.engine.engine import Engine
from cascadevl.engine.engine_backend import EngineBackend
from cascadevl.engine.packed_weights import PackedModel
from cascadevl.engine.requests import Completion, EngineStats, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import RequestError, TrainingError
from cascadevl.losses.gspo import group_advantages
from cascadevl.model.adapters import merged_tensors
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.scoring.rewards import Response, RewardConfig, Verifier, judged
from cascadevl.tasks.problems import Problems
from cascadevl.train.gspo_config import GSPOConfig, PolicyConfig, RolloutConfig
from cascadevl.train.questions import Asked
from cascadevl.types import Rollout, SampledAnswer


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """A question with its answers, and how they compare.

    Attributes:
        asked: The question.
        rollout: Its answers with their rewards.
        increments: Position step with which each picture was read.
        advantages: Of each answer; 0 where nothing is learned from it.
    """

    asked: Asked
    rollout: Rollout
    increments: tuple[float, ...]
    advantages: tuple[float, ...]

    @property
    def is_flat(self) -> bool:
        """Whether all rewards are equal, so that nothing can be learned."""
        return len({answer.reward for answer in self.rollout.answers}) == 1


class Sampler:
    """Draws answers of the model in training.

    Attributes:
        stop_token_id: The template's end of an answer.
    """

    def __init__(
        self,
        model: CascadeVLForConditionalGeneration,
        own: PackedModel | CascadeVLForConditionalGeneration | None,
        processor: CascadeVLProcessor,
        config: RolloutConfig,
    ) -> None:
        """Make the engine.

        Args:
            model: The model in training, where it will stay, adapters included.
            own: The engine's own copy, of its linear layers, made before adapters were put in, or
                of a model that is divided; None to answer with the model itself.
            processor: Makes text of answers.
            config: How answers are drawn.
        """
        self._model, self._own, self._config = model, own, config
        self.stop_token_id = processor.builder.stop_token_ids[0]
        self._backend = EngineBackend(engine=Engine(own or model, processor, config.engine))

    def stats(self) -> EngineStats:
        """What the engine has done since it was made."""
        return self._backend.engine.stats()

    def refresh(self) -> None:
        """Answer with the weights as they are now, in place; adapters are merged into a copy."""
        weights: Mapping[str, Tensor] = self._model.state_dict()
        if isinstance(self._own, PackedModel):
            weights = merged_tensors(self._model)
        self._backend.load(weights)

    def draw(
        self,
        asked: Sequence[Asked],
        *,
        seed: int,
        step: int,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[tuple[Completion, ...]] | None:
        """A group of answers to each question.

        Args:
            asked: The questions.
            seed: Of the run.
            step: Of the run; with the question it names the random stream.
            should_stop: Looked at now and then.

        Returns:
            The answers, in the order of the questions; None if it was to stop.

        Raises:
            TrainingError: If a question cannot be answered; names it.
        """
        requests = [self._request(each, seed, step) for each in asked]
        found: dict[int, tuple[Completion, ...]] = {}
        for number, outcome in self._backend.answer(requests):
            if isinstance(outcome, RequestError):
                raise TrainingError(
                    f"step {step + 1}: the question {asked[number].problem.problem_id} could not "
                    f"be answered: {outcome}"
                ) from outcome
            found[number] = outcome
            if should_stop():
                return None  # the generator calls off what has not been answered
        return [found[number] for number in range(len(asked))]

    def _request(self, asked: Asked, seed: int, step: int) -> Request:
        return Request(
            prompt=asked.prompt,
            sampling=SamplingParams(
                temperature=self._config.temperature,
                seed=named_key(seed, f"rollout/{step}/{asked.number}"),
                max_tokens=self._config.max_answer_tokens,
                logprobs=0,
            ),
            num_samples=self._config.group,
        )


def judge(
    asked: Asked,
    completions: Sequence[Completion],
    verifiers: Mapping[str, Verifier],
    rewards: RewardConfig,
    *,
    max_tokens: int,
    weight_version: str,
) -> Rollout:
    """What was drawn for a question, with rewards.

    Args:
        asked: The question.
        completions: Its answers.
        verifiers: What is looked at.
        rewards: How it is weighed.
        max_tokens: Most tokens an answer could have.
        weight_version: Which weights drew the answers.

    Raises:
        TrainingError: If a verifier gives something that is no number; names the question.
    """
    problem = asked.problem
    answers = []
    is_correct: dict[str, bool] = {}  # many answers of a group are alike
    for completion in completions:
        assert completion.finish_reason != "cancelled", "nobody called it off"
        if completion.text not in is_correct:
            is_correct[completion.text] = problem.check(completion.text)
        response = Response(
            text=completion.text,
            question=problem.prompt.text,
            reference=problem.reference,
            correct=is_correct[completion.text],
            num_tokens=len(completion.drawn),
            max_tokens=max_tokens,
            is_cut=completion.finish_reason == "length",
        )
        try:
            reward = judged(response, verifiers, rewards)
        except ValueError as error:
            raise TrainingError(f"question {problem.problem_id}: {error}") from error
        answers.append(
            SampledAnswer(
                text=completion.text,
                token_ids=completion.drawn,
                finish_reason=completion.finish_reason,
                correct=response.correct,
                rewards=reward.values,
                reward=reward.total,
                logprobs=_logprobs(completion),
            )
        )
    return Rollout(
        problem_id=problem.problem_id,
        prompt=asked.messages,
        reference=problem.reference,
        answers=tuple(answers),
        weight_version=weight_version,
        metric=problem.metric,
        choices=problem.choices,
    )


def _logprobs(completion: Completion) -> tuple[float, ...]:
    """What the engine thought of each token that was drawn, the end included."""
    known = [*(completion.logprobs or ())]
    if completion.end_logprobs is not None:
        known.append(completion.end_logprobs)
    return tuple(each.chosen for each in known)


def compared(
    asked: Sequence[Asked],
    rollouts: Sequence[Rollout],
    drawn: Sequence[Sequence[Completion]],
    policy: PolicyConfig,
    rewards: RewardConfig,
) -> list[Group]:
    """Every question's answers beside each other.

    Args:
        asked: The questions.
        rollouts: Their judged answers.
        drawn: The same as the engine gave them.
        policy: How advantages are computed.
        rewards: Whether answers that were cut off are learned from.
    """
    values = torch.tensor(
        [[answer.reward for answer in rollout.answers] for rollout in rollouts],
        dtype=torch.float64,
    )
    advantages = group_advantages(values, unbiased=policy.unbiased, eps=policy.eps).tolist()
    groups = []
    for one, rollout, completions, row in zip(asked, rollouts, drawn, advantages, strict=True):
        learned = [
            0.0 if rewards.overlong == "leave_out" and answer.finish_reason == "length" else value
            for answer, value in zip(rollout.answers, row, strict=True)
        ]
        groups.append(Group(one, rollout, completions[0].increments, tuple(learned)))
    return groups


@contextmanager
def opened_store(
    config: GSPOConfig, problems: Problems, *, rank: int, world_size: int
) -> Iterator[RolloutStore | None]:
    """The store that rollout batches are written into; None if the run names none.

    A batch that is made again after an interruption is in it once. Several processes write a
    store each, in folders below the named one.

    Args:
        config: The run.
        problems: What is asked.
        rank: Which of the processes this is.
        world_size: Number of processes.

    Raises:
        ConfigError: If the folder holds the rollouts of another run.
    """
    folder = config.rollout.store
    if folder is None:
        yield None
        return
    drawn = {"engine": None, "store": None}
    settings = {
        "problems": problems.settings(),
        "model": config.model.path,
        "run": str(config.run.out),
        "seed": config.run.seed,
        "rollout": asdict(config.rollout) | drawn,
        "rewards": asdict(config.rewards),
    }
    if world_size > 1:
        folder = folder / f"rank-{rank:05d}"
    with open_store(folder, json.loads(json.dumps(settings, default=str))) as store:
        yield store


def sums_of(groups: Sequence[Group]) -> dict[str, float]:
    """Sums over the answers of some groups, and their number: what means over ranks are made of.

    Args:
        groups: At least one.
    """
    answers = [answer for group in groups for answer in group.rollout.answers]
    names = answers[0].rewards
    return {
        "reward": sum(answer.reward for answer in answers),
        "accuracy": float(sum(answer.correct for answer in answers)),
        "length_tokens": float(sum(len(answer.token_ids) for answer in answers)),
        "overlong": float(sum(answer.finish_reason == "length" for answer in answers)),
        **{f"reward/{name}": sum(a.rewards[name] for a in answers) for name in names},
        "skipped_groups": float(sum(len(g.rollout.answers) for g in groups if g.is_flat)),
        "answers": float(len(answers)),
    }
