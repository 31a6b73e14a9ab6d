"""Answers laid out as packed rows, and what of a group costs a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.engine.small_talk import build, model_for, picture
from tests.train.small_gspo import small_config

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.stream import CollateConfig
from cascadevl.losses.gspo import group_advantages
from cascadevl.tasks.problems import Problem
from cascadevl.train.answer_batch import Plan, lay_out, nothing_learned, scored
from cascadevl.train.config import BatchConfig
from cascadevl.train.gspo import policy_objective
from cascadevl.train.questions import Asked
from cascadevl.train.rollouts import Group, sums_of
from cascadevl.types import ImageRef, Message, Rollout, SampledAnswer

ROOMY = BatchConfig(row_tokens=400, row_tiles=16)


@pytest.fixture(scope="module")
def processor() -> CascadeVLProcessor:
    return build()


def collate_of(processor: CascadeVLProcessor) -> CollateConfig:
    return CollateConfig(
        image_token_id=processor.image_token_id,
        pad_token_id=0,
        tokens_per_tile=processor.tokens_per_tile,
    )


def group(
    processor: CascadeVLProcessor,
    rewards: Sequence[float],
    *,
    number: int = 0,
    first: Sequence[int] = (),
) -> Group:
    """A question about a picture with an answer of one token more for each reward."""
    user = Message.of("user", ImageRef(picture(number)), "what is this?")
    prompt = processor.builder.prompt([user], source=f"question {number}")
    problem = Problem(
        problem_id=f"question {number}", prompt=user, reference="4", check=lambda _: False
    )
    answers = tuple(
        SampledAnswer(
            text="",
            token_ids=tuple(first) + tuple(range(30, 31 + place)),
            finish_reason="stop",
            correct=reward > 0,
            rewards={"accuracy": reward},
            reward=reward,
            logprobs=(-1.0,) * (len(first) + 1 + place),
        )
        for place, reward in enumerate(rewards)
    )
    rollout = Rollout(problem_id=problem.problem_id, prompt=(user,), reference="4", answers=answers)
    advantages = group_advantages(torch.tensor([rewards], dtype=torch.float64))[0].tolist()
    increments = (1.0,) * len(prompt.tiles_per_image)
    return Group(Asked(number, problem, (user,), prompt), rollout, increments, tuple(advantages))


def test_answers_keep_their_tokens_advantages_and_engine_log_probabilities(processor):
    groups = [group(processor, (1.0, 0.0, 0.0)), group(processor, (0.0, 1.0), number=1)]
    (plan,) = lay_out(groups, ROOMY, collate_of(processor))
    batch = plan.batch(collate_of(processor))
    assert batch.advantages.tolist() == pytest.approx(
        [*groups[0].advantages, *groups[1].advantages], rel=1e-6
    )
    assert batch.answer.tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 4]
    assert batch.rows.target_ids.tolist() == [30, 30, 31, 30, 31, 32, 30, 30, 31]
    assert batch.engine_logprobs.eq(-1.0).all()
    assert batch.sources == (
        *(f"question 0#{place}" for place in range(4)),
        *(f"question 1#{place}" for place in range(3)),
    )


def test_the_picture_of_a_group_goes_through_the_model_once(processor):
    one = group(processor, (1.0, 0.0, 0.0, 1.0))
    (plan,) = lay_out([one], ROOMY, collate_of(processor))
    batch = plan.batch(collate_of(processor))
    assert batch.rows.tiles is not None
    assert np.array_equal(batch.rows.tiles.numpy(), one.asked.prompt.tiles)


def test_flat_groups_and_answers_without_an_advantage_are_left_out(processor):
    flat = group(processor, (1.0, 1.0), number=1)
    middle = group(processor, (0.0, 0.5, 1.0), number=2)
    assert flat.is_flat
    assert not middle.is_flat
    (plan,) = lay_out([flat, middle], ROOMY, collate_of(processor))
    assert plan.batch(collate_of(processor)).rows.target_ids.tolist() == [30, 30, 31, 32]
    assert lay_out([flat], ROOMY, collate_of(processor)) == []
    sums = sums_of([flat, middle])
    assert sums["skipped_groups"] == 2.0
    assert sums["answers"] == 5.0
    assert sums["reward"] == sums["reward/accuracy"] == 3.5


def test_an_answer_that_holds_the_image_token_is_left_out(processor):
    odd = group(processor, (1.0, 0.0), first=[processor.image_token_id])
    assert lay_out([odd], ROOMY, collate_of(processor)) == []


def test_rows_hold_no_more_than_they_may(processor):
    groups = [group(processor, (1.0, 0.0, 0.0, 1.0), number=number) for number in range(3)]
    collate = collate_of(processor)
    (plan,) = lay_out(groups, ROOMY, collate)
    whole = plan.batch(collate)
    tight = BatchConfig(row_tokens=groups[0].asked.prompt.input_ids.size + 60, row_tiles=3, rows=2)
    batches = [each.batch(collate) for each in lay_out(groups, tight, collate)]
    assert len(batches) > 1
    for batch in batches:
        assert batch.rows.input_ids.shape[0] <= 2
        assert batch.rows.input_ids.shape[1] <= tight.row_tokens
    assert sum(len(batch.advantages) for batch in batches) == len(whole.advantages)
    assert sorted(value for batch in batches for value in batch.advantages.tolist()) == sorted(
        whole.advantages.tolist()
    )


def loss_of(plan: Plan, processor: CascadeVLProcessor, num_answers: int) -> float:
    model, collate = model_for(processor), collate_of(processor)
    config = small_config(Path("unused"), Path("unused"))
    with model.no_drop_path():
        done = scored(model, [plan], collate, temperature=1.0, device=torch.device("cpu"))
        old = done.plans[0].old_logprobs
        assert old is not None
        moved = replace(plan, old_logprobs=old - torch.linspace(0.0, 0.3, len(old)))
        batch = moved.batch(collate)
        terms = policy_objective(config, num_answers).loss(model, batch, 1.0)
    return terms.loss.item()


def test_flat_groups_count_in_the_denominator(processor):
    one = group(processor, (1.0, 0.0, 0.0))
    (plan,) = lay_out([one], ROOMY, collate_of(processor))
    alone, beside = loss_of(plan, processor, 3), loss_of(plan, processor, 6)
    assert alone != 0
    assert beside == pytest.approx(alone / 2)


def test_engine_and_trainer_apart_show_as_a_divergence(processor):
    model = model_for(processor)
    collate = collate_of(processor)
    plans = lay_out([group(processor, (1.0, 0.0))], ROOMY, collate)
    done = scored(model, plans, collate, temperature=1.0, device=torch.device("cpu"))
    assert done.plans[0].old_logprobs is not None
    gap = (done.plans[0].old_logprobs + 1.0).double()  # the engine is said to have had -1
    assert done.sums["tokens"] == 3
    assert done.sums["rollout_gap"] == pytest.approx(gap.abs().sum().item(), rel=1e-5)
    assert done.sums["rollout_kl"] == pytest.approx((gap.exp() - 1 - gap).sum().item(), rel=1e-4)
    assert done.sums["entropy"] > 0


def test_a_share_with_nothing_to_learn_takes_part_without_a_gradient(processor):
    model = model_for(processor)
    batch = nothing_learned(group(processor, (1.0, 1.0)), 30).batch(collate_of(processor))
    config = small_config(Path("unused"), Path("unused"))
    terms = policy_objective(config, 4).loss(model, batch, 1.0)
    terms.loss.backward()
    assert terms.metrics["learned"].item() == 0
    assert all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())
