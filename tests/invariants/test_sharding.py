"""Divided among processes = a copy on each = alone: the same gradients, checkpoints and models.

Real processes with gloo on the CPU. In every step one of them has pictures where another has none,
so that a vision tower that one of them alone called would wait for ever.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from tests.invariants.test_accumulation import Setting
from tests.model.bodies import BODIES, body_model
from tests.model.packed import head, packed_batch
from tests.processes import shared_by
from tests.train import small_gspo
from tests.train.small_pairs import mpo_config, pairs
from tests.train.small_run import QUIET, Given, small_config, sources, tokenizer
from tests.train.small_vico import read_stripes, stripes, vico_config
from tests.train.test_posthoc import both
from tests.train.test_posthoc import config as posthoc_config
from tests.train.test_prm import prm_config, prm_start, solutions
from torch import Tensor

import cascadevl
from cascadevl.errors import ConfigError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.sharding import whole
from cascadevl.scoring.rewards import Response
from cascadevl.train import optim
from cascadevl.train.checkpoint import latest
from cascadevl.train.config import ModelConfig, TrainConfig
from cascadevl.train.gspo import gspo
from cascadevl.train.gspo_config import GSPOConfig, RolloutConfig
from cascadevl.train.loop import TrainState, update
from cascadevl.train.lora import LoraConfig
from cascadevl.train.mpo import mpo
from cascadevl.train.objective import NEXT_TOKEN
from cascadevl.train.optim import OptimConfig, Optimiser
from cascadevl.train.posthoc import posthoc
from cascadevl.train.pretrain import pretrain
from cascadevl.train.prm import prm
from cascadevl.train.router_config import RouterConfig
from cascadevl.train.run import begin
from cascadevl.train.sft import sft
from cascadevl.train.start import make_trainable
from cascadevl.train.tensor_parts import Parts, parts_of, read_parts, write_parts
from cascadevl.train.vico import ViCOConfig, ViCOSection, vico
from cascadevl.types import Batch

STEPS = 3


def steps(out: Path, shard: str, precision: str) -> None:
    """Some steps of this process's share of four batches; keeps gradients, weights and metrics."""
    setting = Setting()
    model = CascadeVLForConditionalGeneration(setting.model.config)
    model.load_state_dict(setting.model.state_dict())
    accelerator = begin(0)
    config = replace(setting.model_config, precision=precision, shard=shard or None)
    make_trainable(model, config, accelerator)
    state: TrainState[Batch] = TrainState(
        model=model,
        optimiser=Optimiser(model.named_parameters(), OptimConfig(lr=1e-3, warmup_ratio=0.0)),
        stream=Given([]),
        accelerator=accelerator,
    )
    number, rank = accelerator.num_processes, accelerator.process_index
    e = setting.examples  # two texts, three pictures
    batches = [setting.batch([part]) for part in (e[:1], e[1:2], e[2:3], e[3:])]
    tensors: dict[str, Tensor] = {}
    told = []
    for step in range(STEPS):
        update(state, batches[rank * 4 // number : (rank + 1) * 4 // number], NEXT_TOKEN)
        told.append([state.metrics["loss"], state.metrics["grad_norm"]])
        if not step:
            names = state.optimiser.masters
            gradients = (gradient.clone() for gradient in state.optimiser.gradients())
            tensors |= {f"{n}.gradient": g for n, g in zip(names, gradients, strict=True)}
        state.optimiser.step(1.0)
        state.optimiser.zero_grad()
    tensors |= {name: master.detach() for name, master in state.optimiser.masters.items()}
    parts = parts_of(model) or Parts({}, is_written=rank == 0)
    kind = f"{number}-{shard or 'copies'}"
    if parts.is_written:
        write_parts(out / f"{kind}-{rank}.safetensors", tensors, parts)
    if rank == 0:
        safetensors.torch.save_file({"told": torch.tensor(told)}, out / f"told-{kind}")
    finish(accelerator)


def finish(accelerator: Accelerator) -> None:
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


def seen(out: Path, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """Whole tensors of a run, and what it told."""
    rows = {name: (0, len(p)) for name, p in Setting().model.named_parameters()}
    tensors = read_parts(out, kind, Parts(rows, is_written=False))
    return tensors, safetensors.torch.load_file(out / f"told-{kind}")["told"]


def assert_alike(out: Path, first: str, second: str, *, tolerance: float) -> None:
    (tensors, told), (others, also_told) = seen(out, first), seen(out, second)
    assert tensors.keys() == others.keys()
    torch.testing.assert_close(told, also_told, rtol=tolerance, atol=0.0)
    gradients = [name for name in tensors if name.endswith(".gradient")]
    assert len(gradients) == len(tensors) / 2
    for name in gradients:
        a, b = tensors[name], others[name]
        assert float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) < tolerance, name


def test_a_divided_model_takes_the_steps_of_one_process(tmp_path: Path) -> None:
    shared_by(2, steps, tmp_path, "full", "float32")
    steps(tmp_path, "", "float32")
    assert_alike(tmp_path, "2-full", "1-copies", tolerance=1e-4)


@pytest.mark.slow
def test_and_those_of_copies_in_bfloat16(tmp_path: Path) -> None:
    for shard in ("full", ""):
        shared_by(2, steps, tmp_path, shard, "bfloat16")
    assert_alike(tmp_path, "2-full", "2-copies", tolerance=2e-3)


@pytest.mark.slow
def test_two_hosts_have_a_copy_each(tmp_path: Path) -> None:
    shared_by(4, steps, tmp_path, "hybrid", "float32", LOCAL_WORLD_SIZE="2")
    steps(tmp_path, "", "float32")
    assert len(list(tmp_path.glob("4-hybrid-*"))) == 2
    assert_alike(tmp_path, "4-hybrid", "1-copies", tolerance=1e-4)


def bodies(out: Path) -> None:
    """The gradient of one batch with and one without pictures, for every body; one has them all."""
    accelerator = begin(0)
    number, rank = accelerator.num_processes, accelerator.process_index
    batches = [packed_batch([[1], [2, 1]]), packed_batch([[], []])]
    for name in BODIES:
        model = body_model(name)
        config = ModelConfig(precision="float32", shard="full" if number > 1 else None)
        make_trainable(model, config, accelerator)
        with model.no_drop_path():
            for batch in batches[rank::number]:
                scores = model(batch=batch, head_fn=head(batch))
                scores.sum().backward()
        gradients = {
            name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None
        }
        if not rank:
            safetensors.torch.save_file(gradients, out / f"{number} {name}")
    finish(accelerator)


@pytest.mark.slow
def test_every_body(tmp_path: Path) -> None:
    shared_by(2, bodies, tmp_path)
    bodies(tmp_path)
    for name in BODIES:
        divided, alone = (safetensors.torch.load_file(tmp_path / f"{n} {name}") for n in (2, 1))
        for key, gradient in alone.items():
            torch.testing.assert_close(divided[key], gradient, rtol=1e-3, atol=1e-4)


def run_config(out: Path, **values: Any) -> TrainConfig:
    return small_config(
        out,
        model__shard="full",
        model__precision="bfloat16",
        model__gradient_checkpointing=True,
        run__num_steps=4,
        run__eval_interval=1,
        run__checkpoint_interval=0,
        **values,
    )


def attempt(out: Path, stop_at: str) -> None:
    """A run of pre-training that is asked to stop after a step, or goes on to its end."""

    def stop(state: TrainState[Batch]) -> None:
        if str(state.step) == stop_at and state.accelerator.process_index == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    config = run_config(out, run__resume=True)
    result = pretrain(config, sources=sources(), tokenizer=tokenizer(), on_step=stop, console=QUIET)
    assert result.finished == (not stop_at)
    finish(Accelerator(cpu=True))


@pytest.mark.slow
def test_a_divided_run_goes_on_bit_for_bit_and_leaves_a_whole_model(tmp_path: Path) -> None:
    shared_by(2, attempt, tmp_path / "whole", "")
    for stop_at in ("2", ""):
        shared_by(2, attempt, tmp_path / "stopped", stop_at)
    models = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "stopped")]
    first, second = (safetensors.torch.load_file(path) for path in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    model, _ = cascadevl.load(models[0].parent)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_three_processes_take_up_what_two_have_left(tmp_path: Path) -> None:
    shared_by(2, attempt, tmp_path / "run", "2")
    checkpoint = latest(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert len(list(checkpoint.glob("weights-*"))) == 2
    assert not (checkpoint / "weights.safetensors").exists()
    shared_by(3, attempt, tmp_path / "run", "")
    cascadevl.load(tmp_path / "run" / "model")


def align(out: Path, start: Path, shard: str) -> None:
    """MPO with a stored reference; one process has more of it to compute than the other."""
    values = {"mpo__reference_part": 5, "model__shard": shard or None, "run__num_steps": 3}
    mpo(mpo_config(out, start, **values), sources=pairs(11), console=QUIET)
    finish(Accelerator(cpu=True))


@pytest.mark.slow
def test_mpo_of_a_divided_model_stores_its_reference_first(tmp_path: Path) -> None:
    mpo_config(tmp_path, tmp_path / "start")  # makes the model to start from
    models, references, facts = [], [], []
    for shard in ("full", ""):
        out = tmp_path / (shard or "copies")
        shared_by(2, align, out, tmp_path / "start", shard)
        models.append(safetensors.torch.load_file(out / "model" / "model.safetensors"))
        files = sorted((out / "reference").glob("part-*"))
        references.append([safetensors.torch.load_file(file) for file in files])
        facts.append(json.loads((out / "reference" / "facts.json").read_text()))
    assert facts[0] == facts[1]
    for part, other in zip(*references, strict=True):
        torch.testing.assert_close(part["logprobs"], other["logprobs"])
    for name, weight in models[0].items():
        torch.testing.assert_close(weight, models[1][name], rtol=1e-3, atol=1e-4)


def consist(out: Path, start: Path) -> None:
    """ViCO's first stage, in which one image needs the second projector and another does not."""
    values = {"model__shard": "full", "vico__reference": "stored", "run__num_steps": 3}
    config = vico_config(out, start, **values)
    vico(config, sources=stripes(), console=QUIET)
    finish(Accelerator(cpu=True))


@pytest.mark.slow
def test_vico_of_a_divided_model(tmp_path: Path) -> None:
    start = read_stripes(tmp_path / "start", 2)
    shared_by(2, consist, tmp_path / "vico", start)
    model, _ = cascadevl.load(tmp_path / "vico" / "model")
    assert model.model.compressed_projector is not None


def judge(out: Path, start: Path, shard: str) -> None:
    """A process reward model."""
    prm(prm_config(out, start, model__shard=shard or None), sources=solutions(), console=QUIET)
    finish(Accelerator(cpu=True))


def warm_up(out: Path, start: Path, shard: str) -> None:
    """The post-hoc route: first the projector alone learns, between halves without gradients."""
    del start
    config = posthoc_config(out, model__shard=shard or None)
    posthoc(config, sources=both(), tokenizer=tokenizer(), console=QUIET)
    finish(Accelerator(cpu=True))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [judge, warm_up])
def test_other_recipes_end_as_with_copies(tmp_path: Path, recipe: Any) -> None:
    prm_start(tmp_path / "start")
    models = []
    for shard in ("full", ""):
        out = tmp_path / (shard or "copies")
        shared_by(2, recipe, out, tmp_path / "start", shard)
        (file, *_) = sorted(out.rglob("model/model.safetensors"))
        models.append(safetensors.torch.load_file(file))
    for name, weight in models[0].items():
        torch.testing.assert_close(weight, models[1][name], rtol=1e-3, atol=1e-4)


def odd_on_the_first(response: Response) -> float:
    """Answers that the second process draws are all alike: it has nothing to learn."""
    return small_gspo.odd_length(response) if os.environ["RANK"] == "0" else 1.0


def reinforce(out: Path, start: Path, shard: str) -> None:
    """Two rollout batches of GSPO, of which one process has batches and the other none."""
    more: dict[str, Any] = {
        "model__shard": shard or None,
        "rewards__weights": {f"{__name__}:odd_on_the_first": 1.0},
    }
    config = small_gspo.small_config(out, start, **more)
    gspo(config, problems=small_gspo.problems(), console=QUIET)
    finish(Accelerator(cpu=True))


@pytest.mark.slow
def test_gspo_of_a_divided_model_answers_with_a_copy(tmp_path: Path) -> None:
    start = small_gspo.write_start(tmp_path)
    logs, models = [], []
    for shard in ("full", ""):
        out = tmp_path / (shard or "copies")
        shared_by(2, reinforce, out, start, shard)
        models.append(safetensors.torch.load_file(out / "model" / "model.safetensors"))
        logs.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    for mine, theirs in zip(*logs, strict=True):
        assert mine["ratio"] == pytest.approx(theirs["ratio"], rel=1e-4)
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    assert logs[0][0]["ratio"] == 1.0
    for name, weight in models[0].items():
        torch.testing.assert_close(weight, models[1][name], rtol=1e-3, atol=1e-4)


def adapt(out: Path, start: Path, shard: str) -> None:
    """LoRA on a frozen base."""
    config = small_config(
        out,
        model__preset=None,
        model__path=str(start),
        model__shard=shard or None,
        run__num_steps=3,
    )
    sft(replace(config, lora=LoraConfig(dropout=0.0)), sources=sources(), console=QUIET)
    finish(Accelerator(cpu=True))


@pytest.mark.slow
def test_adapters_of_a_divided_base(tmp_path: Path) -> None:
    mpo_config(tmp_path, tmp_path / "start")  # makes the model to start from
    found = []
    for shard in ("full", ""):
        out = tmp_path / (shard or "copies")
        shared_by(2, adapt, out, tmp_path / "start", shard)
        (file,) = (out / "adapter").glob("*.safetensors")
        found.append(safetensors.torch.load_file(file))
        cascadevl.load(out / "adapter")
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=1e-3, atol=1e-4)


def test_one_process_cannot_divide_anything() -> None:
    setting = Setting()
    config = replace(setting.model_config, shard="full")
    with pytest.raises(ConfigError, match=r"among processes, and there is one.*torchrun"):
        make_trainable(setting.model, config, Accelerator(cpu=True))


def test_a_second_model_is_not_kept_beside_a_divided_one() -> None:
    config = ViCOConfig(vico=ViCOSection(reference="stored"))
    model = replace(config.model, shard="full")
    replace(config, model=model)
    with pytest.raises(ConfigError, match="use stored"):
        replace(config, model=model, vico=ViCOSection(reference="copy"))


def test_muon_needs_whole_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "DTensor", torch.nn.Parameter)  # stands for a divided weight
    parameters = Setting().model.named_parameters()
    with pytest.raises(ConfigError, match=r"whole matrices.*use adamw"):
        Optimiser(parameters, OptimConfig(name="muon"))


def test_what_needs_whole_weights_says_so() -> None:
    model = replace(GSPOConfig().model, shard="full")
    GSPOConfig(model=model)
    for refused in (
        lambda: RouterConfig(model=replace(RouterConfig().model, shard="full")),
        lambda: GSPOConfig(model=model, lora=LoraConfig()),
        lambda: GSPOConfig(model=model, rollout=RolloutConfig(precision="packed")),
    ):
        with pytest.raises(ConfigError, match=r"model.shard is full, but"):
            refused()
