"""The recipe of MPO: it learns, resumes exactly, and says what is wrong."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from tests.reference import mpo_by_hand
from tests.train.run_folders import crashing_at, differing, logged
from tests.train.small_pairs import COLOURS, Pairs, mpo_config, pairs
from tests.train.small_run import QUIET, Given

import cascadevl
from cascadevl.data.mixture import WeightedSource
from cascadevl.data.pairs import PairBatch, PairBuilder, PairCollate
from cascadevl.errors import ConfigError, TrainingError
from cascadevl.losses.mpo import MPOSettings, rewards
from cascadevl.train import mpo_objective as module
from cascadevl.train.checkpoint import latest, load
from cascadevl.train.loop import TrainState, update
from cascadevl.train.lora import LoraConfig
from cascadevl.train.mpo import MPOConfig, mpo
from cascadevl.train.mpo_objective import ShiftMemory, pair_logprobs
from cascadevl.train.optim import OptimConfig, Optimiser
from cascadevl.train.run import TrainResult
from cascadevl.train.sources import collate_config, example_builder
from cascadevl.train.start import start_from

NUM_STEPS = 6
RECORDED = {
    "loss",
    "preference",
    "quality",
    "generation",
    "reward_chosen",
    "reward_rejected",
    "margin",
    "accuracy",
    "kl",
    "reward_shift",
    "pairs",
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mpo") / "start"


def run(out: Path, start: Path, on_step: Any = None, **values: Any) -> TrainResult:
    settings = {"run__num_steps": NUM_STEPS, "run__eval_interval": 1, **values}
    return mpo(mpo_config(out, start, **settings), sources=pairs(), on_step=on_step, console=QUIET)


@pytest.fixture(scope="module")
def uninterrupted(start: Path) -> Path:
    out = start.with_name("uninterrupted")
    run(out, start)
    return out


def test_it_learns_to_tell_the_answers_apart(start: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "run", start, run__num_steps=30, batch__row_samples=6)
    first, *_, last = logged(tmp_path / "run")
    assert first.keys() >= RECORDED
    assert first["pairs"] == 6
    assert first["preference"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["quality"] == pytest.approx(2 * math.log(2), abs=1e-4)
    assert abs(first["kl"]) < 1e-3
    assert first["reward_shift"] == 0
    assert last["accuracy"] == 1
    assert last["margin"] > 0.5
    assert last["loss"] < first["loss"] - 1
    assert result.counters["samples"] == 30 * 6  # a pair is a sample
    model, _ = cascadevl.load(str(result.model_path))
    assert model.dtype == torch.float32


def test_the_shift_is_the_mean_of_the_rewards_before_the_step(uninterrupted: Path) -> None:
    """Kills: the mean taken before use, a mean of this step alone, chosen rewards alone."""
    seen: list[float] = []
    for line in logged(uninterrupted):
        wanted = sum(seen) / len(seen) if seen else 0.0
        assert line["reward_shift"] == pytest.approx(wanted, rel=1e-5, abs=1e-9)
        seen += [line["reward_chosen"], line["reward_rejected"]]
    path = latest(uninterrupted / "checkpoints")
    assert path is not None
    memory = load(path).memory
    assert memory["count"] == 2 * 2 * NUM_STEPS
    assert memory["total"] / memory["count"] == pytest.approx(sum(seen) / len(seen), rel=1e-5)
    assert abs(memory["total"]) > 1e-3  # it moved


@pytest.mark.parametrize("before_use", [False, True])
def test_a_run_that_crashed_goes_on_with_its_shift_as_if_nothing_happened(
    start: Path, tmp_path: Path, before_use: bool
) -> None:
    values = {"mpo__update_before_use": before_use, "model__precision": "bfloat16"}
    run(tmp_path / "whole", start, **values)
    crash = crashing_at(random.Random(before_use).randrange(3, NUM_STEPS))
    with pytest.raises(MemoryError):
        run(tmp_path / "run", start, on_step=crash, **values)
    assert run(tmp_path / "run", start, run__resume=True, **values).finished
    assert differing(tmp_path / "whole", tmp_path / "run", NUM_STEPS) == []
    kept = [
        [{k: v for k, v in line.items() if k in RECORDED} for line in logged(tmp_path / name)]
        for name in ("whole", "run")
    ]
    assert kept[0] == kept[1]
    memories = [load(latest(tmp_path / n / "checkpoints")).memory for n in ("whole", "run")]  # type: ignore[arg-type]
    assert memories[0] == memories[1]


class Setting:
    """The model and two batches of pairs, with a reference that is not the model."""

    def __init__(self, config: MPOConfig) -> None:
        self.model, processor = start_from(config.model)
        build = PairBuilder(example_builder(config.data, processor, 0))
        examples = [build(Pairs()[n]) for n in range(5)]
        collate = PairCollate(packed=collate_config(config.batch, processor, self.model.config))
        self.batches = [collate([examples[:2]]), collate([examples[2:]])]
        self.batches = [
            replace(b, reference=torch.full((2, len(b.sources)), -30.0)) for b in self.batches
        ]

    def state(self, memory: ShiftMemory) -> TrainState[PairBatch]:
        optimiser = Optimiser(self.model.named_parameters(), OptimConfig(max_grad_norm=0.0))
        optimiser.zero_grad()
        return TrainState(
            model=self.model,
            optimiser=optimiser,
            stream=Given([]),
            accelerator=Accelerator(cpu=True),
            memory=memory,
        )


@pytest.fixture(scope="module")
def setting(start: Path) -> Setting:
    return Setting(mpo_config(start.parent / "unused", start))


def test_update_before_use_takes_each_micro_batch_in_first(setting: Setting) -> None:
    """As the public code: the shift of a micro-batch is a cumulative mean with it included."""
    memory = ShiftMemory(before_use=True)
    state = setting.state(memory)
    objective = module.mpo_objective(MPOSettings(), memory, state.accelerator)
    update(state, setting.batches, objective)
    gradients = [g.clone() for g in state.optimiser.gradients()]
    memory.advance(state.metrics)

    seen: list[float] = []
    shifts = []
    for batch in setting.batches:
        with torch.no_grad():
            found = rewards(pair_logprobs(setting.model, batch), beta=0.1)
        seen += torch.cat(found).tolist()
        shifts.append(sum(seen) / len(seen))
    assert memory.shift.value == pytest.approx(shifts[-1], rel=1e-6)
    assert memory.shift.count == 10
    shares = [len(batch.sources) / 5 * shift for batch, shift in zip(setting.batches, shifts)]  # noqa: B905
    assert state.metrics["reward_shift"] == pytest.approx(sum(shares), rel=1e-5)

    # The gradient is that of constant shifts: nothing flows through the rewards in the mean.
    model = setting.model
    model.zero_grad()
    for batch, shift in zip(setting.batches, shifts, strict=True):
        fixed = module.mpo_loss(
            pair_logprobs(model, batch), 5.0, reward_shift=shift, settings=MPOSettings()
        )
        fixed.loss.backward()
    for gradient, parameter in zip(gradients, state.optimiser.parameters.values(), strict=True):
        wanted = torch.zeros_like(gradient) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    model.zero_grad()


def test_by_default_a_step_waits_for_its_end(setting: Setting) -> None:
    memory = ShiftMemory()
    state = setting.state(memory)
    objective = module.mpo_objective(MPOSettings(), memory, state.accelerator)
    update(state, setting.batches, objective)
    assert memory.shift.count == 0
    assert state.metrics["reward_shift"] == 0
    memory.advance(state.metrics)
    assert memory.shift.count == 10
    both = (state.metrics["reward_chosen"] + state.metrics["reward_rejected"]) / 2
    assert memory.shift.value == pytest.approx(both)
    restored = ShiftMemory()
    restored.load_state_dict(json.loads(json.dumps(memory.state_dict())))
    assert restored.shift == memory.shift
    state.optimiser.zero_grad()


def test_the_step_equals_the_report_by_hand(setting: Setting) -> None:
    """From the tokens' log-probabilities of the model on: its sums, lengths and means."""
    answers: list[mpo_by_hand.Pair] = []
    for batch in setting.batches:
        each: list[float] = []

        def head(logits: torch.Tensor, where: slice, batch: Any = batch) -> torch.Tensor:
            ids = batch.packed.target_ids[where]
            return logits.log_softmax(-1).gather(1, ids[:, None]).squeeze(1)

        with torch.no_grad():
            each = setting.model(batch=batch.packed, head_fn=head).tolist()
        samples = batch.packed.target_samples.tolist()
        for pair in zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True):
            tokens = [[x for x, n in zip(each, samples, strict=True) if n == k] for k in pair]
            # the made-up reference gives -30 to every whole answer
            chosen, rejected = (
                mpo_by_hand.Answer(own, [-30 / len(own)] * len(own)) for own in tokens
            )
            answers.append((chosen, rejected))
    memory = ShiftMemory()
    state = setting.state(memory)
    objective = module.mpo_objective(MPOSettings(), memory, state.accelerator)
    update(state, setting.batches, objective)
    assert state.metrics["loss"] == pytest.approx(mpo_by_hand.loss(answers, 0.0), rel=1e-5)
    memory.advance(state.metrics)
    assert memory.shift.value == pytest.approx(mpo_by_hand.shift_of([answers]), rel=1e-5)
    state.optimiser.zero_grad()


def test_a_loss_that_is_not_finite_names_the_pairs(setting: Setting) -> None:
    broken = replace(setting.batches[1], reference=torch.full((2, 3), math.nan))
    memory = ShiftMemory()
    state = setting.state(memory)
    objective = module.mpo_objective(MPOSettings(), memory, state.accelerator)
    with pytest.raises(TrainingError, match="colours:2, colours:3, colours:4") as error:
        update(state, [setting.batches[0], broken], objective)
    assert "colours:0" not in str(error.value)
    assert memory.shift.count == 0
    state.optimiser.zero_grad()


def test_with_adapters_off_the_base_is_the_reference(start: Path, tmp_path: Path) -> None:
    lora = LoraConfig(rank=4, dropout=0.5)
    values = {"lora": lora, "run__num_steps": 4, "optim__lr": 1e-2}
    for reference in ("stored", "adapters_off"):
        run(tmp_path / reference, start, mpo__reference=reference, **values)
    stored, asked = logged(tmp_path / "stored"), logged(tmp_path / "adapters_off")
    assert not (tmp_path / "adapters_off" / "reference").exists()
    for first, second in zip(stored, asked, strict=True):
        for name in RECORDED:
            assert first[name] == pytest.approx(second[name], rel=1e-3, abs=1e-4), name
    assert abs(stored[-1]["kl"]) > 1e-2  # the adapters did move
    assert (tmp_path / "stored" / "adapter").is_dir()


def test_what_cannot_work_is_refused(start: Path, tmp_path: Path) -> None:
    for words, values in (
        ("leave it out", {"model__drop_path": 0.1}),
        ("add --lora", {"mpo__reference": "adapters_off"}),
        ("none may be negative", {"mpo__quality_weight": -0.1}),
        ("one must be above 0", dict.fromkeys(
            ("mpo__preference_weight", "mpo__quality_weight", "mpo__generation_weight"), 0.0)),
        ("beta is 0", {"mpo__beta": 0.0}),
        ("label_smoothing is 0.5", {"mpo__label_smoothing": 0.5}),
        ("above 0, for example", {"mpo__preference": "exo_pair"}),
        ("reference_part is 0", {"mpo__reference_part": 0}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            mpo_config(tmp_path, start, **values)
    nowhere = mpo_config(tmp_path / "run", start, model__path=None)
    with pytest.raises(ConfigError, match=r"model\.path"):
        mpo(nowhere, sources=pairs(), console=QUIET)


def test_an_older_run_is_spared_before_anything_is_computed(uninterrupted: Path, start: Path):
    before = sorted((uninterrupted / "reference").iterdir())
    with pytest.raises(TrainingError, match="older run"):
        run(uninterrupted, start)
    assert sorted((uninterrupted / "reference").iterdir()) == before


def test_pairs_that_cannot_be_used_are_counted(start: Path, tmp_path: Path) -> None:
    class Broken(Pairs):
        def __getitem__(self, index: int, /) -> Any:
            record = super().__getitem__(index)
            return replace(record, branches=record.branches[:1]) if index == 4 else record

    result = mpo(
        mpo_config(tmp_path / "run", start, run__num_steps=NUM_STEPS),
        sources=[WeightedSource(source=Broken())],
        console=QUIET,
    )
    assert result.skipped == {("colours", "not_a_pair"): 1}
    assert result.finished
    files = sorted((tmp_path / "run" / "reference").glob("*.safetensors"))
    counts = [len(safetensors.torch.load_file(file)["keys"]) for file in files]
    assert counts == [4, 5, 2]


def test_the_setting_is_what_it_says() -> None:
    assert len(set(COLOURS)) == len(COLOURS)
    assert Pairs()[1].branches[0] != Pairs()[1].branches[1]
