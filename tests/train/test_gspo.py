"""The GSPO recipe: the engine in the loop, exact ratios, groups without a signal, and a bandit."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.train.run_folders import crashing_at, logged
from tests.train.small_gspo import (
    EVEN_START,
    problems,
    run,
    small_config,
    write_questions,
    write_start,
)
from tests.train.small_run import QUIET

import cascadevl
from cascadevl.data.rollouts import StoredRollouts
from cascadevl.errors import ConfigError, TrainingError
from cascadevl.train.checkpoint import latest
from cascadevl.train.gspo import gspo
from cascadevl.train.gspo_config import GSPOConfig, PolicyConfig, RolloutConfig
from cascadevl.train.loop import TrainState


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("gspo"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model, _ = cascadevl.load(folder, dtype=torch.float32)
    return {name: value.clone() for name, value in model.state_dict().items()}


BATCH_VALUES = {
    *("reward", "accuracy", "length_tokens", "overlong", "skipped_groups"),
    *("entropy", "rollout_kl", "rollout_gap", "answers_per_s", "tokens_per_s"),
    *("rollout_s", "scoring_s", "old_logprobs_s", "update_s", "refresh_s"),
}


def test_a_run_moves_the_model_logs_its_batches_and_leaves_a_model(start: Path, tmp_path: Path):
    result = run(tmp_path / "run", start)
    assert (result.steps, result.finished) == (4, True)
    assert result.model_path == tmp_path / "run" / "model"
    before, after = weights(start), weights(result.model_path)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    lines = logged(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert {"loss", "grad_norm", "clipped", "ratio", "lr"} <= line.keys()
        assert (line.keys() >= BATCH_VALUES) == (line["step"] in (2, 4))  # ends of the batches
    assert lines[1]["overlong"] > 0.9  # answers of six tokens at most
    assert 0 < lines[1]["entropy"] < 6
    assert 0 <= lines[1]["reward"] <= 1


KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"model__precision": "bfloat16"},
    "checkpointed": {"model__gradient_checkpointing": True},
    "lora": {"lora": True},
    "hot": {"rollout__temperature": 1.5},
    "token": {"policy__level": "token"},
    "several rows": {"batch__rows": 3, "batch__row_tokens": 110},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_ratio_is_exactly_1_before_the_first_update_of_a_batch(
    start: Path, tmp_path: Path, kind: str
):
    run(tmp_path / "run", start, **KINDS[kind])
    lines = logged(tmp_path / "run")
    assert [line["ratio"] for line in lines[::2]] == [1.0, 1.0]
    assert [line["clipped"] for line in lines[::2]] == [0.0, 0.0]
    assert all(line["ratio"] != 1.0 for line in lines[1::2])


@pytest.mark.parametrize("precision", ["model", "packed"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_engine_draws_from_the_weights_as_they_are(
    start: Path, tmp_path: Path, precision: str, lora: bool
):
    run(
        tmp_path / "run",
        start,
        lora=lora,
        rollout__precision=precision,
        run__num_steps=6,
        optim__lr=1e-2,
    )
    lines = logged(tmp_path / "run")[1::2]
    assert len(lines) == 3
    for line in lines:  # the same questions again: pages of old weights would show
        assert line["rollout_gap"] < 1e-4
        assert 0 <= line["rollout_kl"] < 1e-6


def test_answers_are_the_same_whatever_the_packing(start: Path, tmp_path: Path):
    """The loss and the gradient of a step do not depend on which answers share a row."""
    wide, narrow = (
        run(
            tmp_path / f"{tokens}",
            start,
            batch__row_tokens=tokens,
            rollout__group=16,
            run__num_steps=2,
        )
        for tokens in (512, 108)
    )
    assert wide.counters["tokens"] < narrow.counters["tokens"]  # prompts are computed more often
    for one, other in zip(logged(tmp_path / "512"), logged(tmp_path / "108"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_groups_with_equal_rewards_cost_no_forward_and_no_update(start: Path, tmp_path: Path):
    nothing = {"tests.train.small_gspo:constant": 1.0}
    result = run(tmp_path / "run", start, rewards__weights=nothing)
    learned = {name: result.counters[name] for name in ("tokens", "tiles", "samples")}
    assert learned == {"tokens": 0, "tiles": 0, "samples": 0}
    assert result.counters["rollout_tokens"] > result.counters["rollout_tiles"] > 0
    assert result.steps == 4
    before, after = weights(start), weights(tmp_path / "run" / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert logged(tmp_path / "run")[1]["skipped_groups"] == 1.0


def test_a_bandit_reaches_its_optimum(start: Path, tmp_path: Path):
    """Answers of one token; the good ones are worth 1, and in the end nearly all are good."""
    config = small_config(
        tmp_path / "run",
        start,
        rollout__prompts=6,
        rollout__group=16,
        rollout__max_answer_tokens=1,
        rewards__weights={EVEN_START: 1.0},
        optim__lr=1e-3,
        run__num_steps=40,
        run__checkpoint_interval=0,
    )
    gspo(config, problems=write_questions(tmp_path), console=QUIET)
    rewards = [line["reward"] for line in logged(tmp_path / "run") if "reward" in line]
    assert rewards[0] < 0.7
    assert rewards[-1] > 0.95


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_answers(start: Path, tmp_path: Path):
    def poison(state: TrainState[Any]) -> None:
        with torch.no_grad():
            state.model.get_parameter("lm_head.weight").fill_(torch.nan)

    with pytest.raises(TrainingError, match=r"step 2: the loss is.*nan.*samples: .*#1"):
        run(tmp_path / "run", start, on_step=poison, run__eval_interval=1)


def test_a_model_that_cannot_answer_stops_the_run_and_names_the_question(
    start: Path, tmp_path: Path
):
    def poison(state: TrainState[Any]) -> None:
        with torch.no_grad():
            state.model.get_parameter("lm_head.weight").fill_(torch.nan)

    with pytest.raises(TrainingError, match=r"step 3: the question shapes.*not finite"):
        run(tmp_path / "run", start, on_step=poison, run__eval_interval=2)


def test_a_reward_that_is_no_number_stops_the_run_and_names_the_question(
    start: Path, tmp_path: Path
):
    broken = {"tests.scoring.test_rewards:broken": 1.0}
    with pytest.raises(TrainingError, match=r"question shapes.*broken' gave nan"):
        run(tmp_path / "run", start, rewards__weights=broken)


def test_a_run_that_crashed_within_a_batch_makes_the_batch_again(start: Path, tmp_path: Path):
    whole = run(tmp_path / "whole", start, run__eval_interval=1)
    with pytest.raises(MemoryError):
        # Where the second batch has begun.
        run(tmp_path / "run", start, on_step=crashing_at(3), run__eval_interval=1)
    path = latest(tmp_path / "run" / "checkpoints")
    assert path is not None
    assert path.name == "checkpoint-00000002"
    result = run(tmp_path / "run", start, run__eval_interval=1, run__resume=True)
    assert result.finished
    assert whole.model_path is not None
    before, after = weights(whole.model_path), weights(tmp_path / "run" / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)
    for one, other in zip(logged(tmp_path / "whole"), logged(tmp_path / "run"), strict=True):
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])


def test_rollout_batches_are_kept_once_even_if_they_are_made_again(start: Path, tmp_path: Path):
    more = {"run__eval_interval": 1, "rollout__store": tmp_path / "store"}
    with pytest.raises(MemoryError):
        run(tmp_path / "run", start, on_step=crashing_at(3), **more)
    assert len(StoredRollouts(tmp_path / "store")) == 8  # the second batch was cut short later
    run(tmp_path / "run", start, **more, run__resume=True)
    stored = list(StoredRollouts(tmp_path / "store"))
    assert len(stored) == 8
    assert {rollout.weight_version for rollout in stored} == {"run, step 0", "run, step 2"}
    for rollout in stored:
        assert len(rollout.answers) == 8
        assert all(len(each.logprobs) == len(each.token_ids) for each in rollout.answers)
    values = [answer.reward for rollout in stored[:4] for answer in rollout.answers]
    assert logged(tmp_path / "run")[1]["reward"] == pytest.approx(sum(values) / len(values))


def test_sigterm_ends_the_run_at_the_border_of_a_batch(start: Path, tmp_path: Path):
    def ask(state: TrainState[Any]) -> None:
        if state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    text = io.StringIO()
    config = small_config(tmp_path / "run", start, run__eval_interval=1, run__checkpoint_interval=0)
    stopped = gspo(config, problems=problems(), on_step=ask, console=Console(file=text, width=200))
    assert (stopped.finished, stopped.steps, stopped.model_path) == (False, 2, None)
    assert "stopped after step 2 of 4" in text.getvalue()
    whole = run(tmp_path / "whole", start)
    resumed = run(
        tmp_path / "run", start, run__eval_interval=1, run__checkpoint_interval=0, run__resume=True
    )
    assert whole.model_path is not None
    assert resumed.model_path is not None
    before, after = weights(whole.model_path), weights(resumed.model_path)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rollout__prompts": 5}, "rollout.prompts is 5.*use 4 or 6"),
        ({"run__num_steps": 3}, "run.num_steps is 3.*use 2 or 4"),
        ({"rollout__group": 1}, "rollout.group is 1"),
        ({"rollout__temperature": 0.0}, "greedy answers are all alike"),
        ({"data__max_tokens": 50}, "106 tokens together, but data.max_tokens is 50"),
        ({"batch__row_tokens": 50}, "106 tokens together, but batch.row_tokens is 50"),
        ({"data__jpeg": True}, "does not read data.jpeg"),
        ({"run__global_batch": 8}, "does not read run.global_batch"),
        ({"policy__clip_low": 1.5}, "policy.clip_low is 1.5"),
    ],
)
def test_what_cannot_work_is_refused_with_the_numbers(
    start: Path, tmp_path: Path, values: dict[str, Any], words: str
):
    with pytest.raises(ConfigError, match=words):
        small_config(tmp_path, start, **values)


def test_a_model_and_questions_are_asked_for(start: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="--model DIR"):
        gspo(small_config(tmp_path, start, model__path=None), console=QUIET)
    with pytest.raises(ConfigError, match="--questions"):
        gspo(small_config(tmp_path, start), console=QUIET)


def test_defaults_are_those_of_the_paper_and_the_scripts():
    config = GSPOConfig()
    assert config.policy == PolicyConfig(updates=4, clip_low=3e-4, clip_high=4e-4, unbiased=False)
    assert config.rollout == RolloutConfig(prompts=512, group=16, temperature=1.0)
    assert dict(config.rewards.weights) == {"accuracy": 0.9, "format": 0.1}
    assert config.optim.lr == 1e-6
