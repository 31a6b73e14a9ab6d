"""Which layers LoRA adapts, what it computes, and that it trains nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft.tuners.lora import ParamWrapper
from tests.model.bodies import BODIES, body_model
from tests.model.packed import head, packed_batch
from tests.train.run_folders import crashing_at, differing, final_tensors, logged
from tests.train.small_run import QUIET, small_config, sources, tokenizer
from torch import Tensor

import cascadevl
from cascadevl.config import load_config
from cascadevl.errors import ConfigError, TrainingError
from cascadevl.model.adapters import (
    adapter_layers,
    adapter_parameters,
    adapters_off,
    is_adapter,
    plain_name,
)
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.train.config import ModelConfig, TrainConfig
from cascadevl.train.loop import TrainState, update
from cascadevl.train.lora import LoraConfig, add_adapters, find_targets
from cascadevl.train.objective import NEXT_TOKEN
from cascadevl.train.optim import Optimiser
from cascadevl.train.posthoc import PosthocConfig, warmup_of
from cascadevl.train.pretrain import pretrain
from cascadevl.train.sft import sft
from cascadevl.train.start import make_trainable
from cascadevl.types import Batch

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
EXPERTS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
MIXTURES = ("qwen3_moe", "gpt_oss")
EVERYWHERE = LoraConfig(parts=("vision", "projector", "language"), rank=3, alpha=5)


def adapted(
    name: str = "qwen3", config: LoraConfig = EVERYWHERE, **values: Any
) -> CascadeVLForConditionalGeneration:
    """A body with adapters, in evaluation mode."""
    model = body_model(name)
    add_adapters(model, config, seed=0, **values)
    return model.eval()


def moved(model: CascadeVLForConditionalGeneration) -> CascadeVLForConditionalGeneration:
    """The model with random values in all adapters, as if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def scores(model: CascadeVLForConditionalGeneration) -> Tensor:
    batch = packed_batch([[1], [], [2, 1]])
    with torch.no_grad():
        result = model(batch=batch, head_fn=head(batch))
    assert isinstance(result, Tensor)
    return result


def places(model: CascadeVLForConditionalGeneration) -> set[str]:
    """What is adapted, experts by the name of their parameter."""
    found = set()
    for name, layer in adapter_layers(model):
        end = f".{layer.parameter_name}" if isinstance(layer, ParamWrapper) else ""
        found.add(plain_name(name) + end)
    return found


@pytest.mark.parametrize("name", BODIES)
def test_the_released_targets_of_every_body_and_no_effect_at_first(name: str) -> None:
    model = body_model(name)
    before = scores(model)
    add_adapters(model, LoraConfig(), seed=0)
    ends = ATTENTION | (EXPERTS if name in MIXTURES else MLP)
    assert places(model) == {
        f"model.language_model.layers.{number}.{end}" for number in range(2) for end in ends
    }
    assert torch.equal(scores(model.eval()), before)
    assert isinstance(model, CascadeVLForConditionalGeneration)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(model))
    dropouts = {
        m.p
        for _, layer in adapter_layers(model)
        for m in layer.lora_dropout.modules()
        if isinstance(m, torch.nn.Dropout)
    }
    assert dropouts == (set() if name in MIXTURES else {0.05})


def test_vision_and_projector_where_they_are_asked_for() -> None:
    vision = {
        f"model.vision_tower.encoder.layer.{number}.{end}"
        for number in range(2)
        for end in (
            *(f"attention.{part}_proj" for part in "qkv"),
            "attention.projection_layer",
            "mlp.fc1",
            "mlp.fc2",
        )
    }
    projector = {f"model.multi_modal_projector.linear_{number}" for number in (1, 2)}
    assert places(adapted(config=LoraConfig(parts=("vision",)))) == vision
    assert places(adapted(config=LoraConfig(parts=("projector",)))) == projector
    assert len(places(adapted())) == len(vision) + len(projector) + 2 * 7
    assert places(adapted(frozen=("vision", "language"))) == projector


def test_chosen_targets_and_mixtures_without_their_experts() -> None:
    config = LoraConfig(targets=("q_proj", "mlp.down_proj"))
    tower = "model.language_model.layers."
    assert places(adapted(config=config)) == {
        f"{tower}{number}.{end}"
        for number in range(2)
        for end in ("self_attn.q_proj", "mlp.down_proj")
    }
    only = LoraConfig(targets=("experts.down_proj",))
    assert places(adapted("gpt_oss", only)) == {
        f"{tower}{number}.mlp.experts.down_proj" for number in range(2)
    }
    without = LoraConfig(experts=False, dropout=0.1)
    assert places(adapted("qwen3_moe", without)) == {
        f"{tower}{number}.{end}" for number in range(2) for end in ATTENTION
    }


@pytest.mark.parametrize(
    ("config", "frozen", "message"),
    [
        (LoraConfig(targets=("q_pro",)), (), r"ends with 'q_pro'; did you mean 'q_proj'"),
        (LoraConfig(targets=("attn.qkv",)), (), r"adapted parts \(language\)"),
        (LoraConfig(targets=("fc1",)), (), r"ends with 'fc1'"),  # of the vision tower
        (LoraConfig(), ("language",), r"model\.frozen \(language\)"),
    ],
)
def test_what_cannot_be_adapted_is_named(
    config: LoraConfig, frozen: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        find_targets(body_model("qwen3"), config, frozen=frozen)


def test_settings_that_mean_nothing_are_refused() -> None:
    for values in ({"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"parts": ()}):
        with pytest.raises(ConfigError, match=rf"lora\.{next(iter(values))}"):
            LoraConfig(**values)
    for values in ({"dropout": 0.05}, {"dora": True}):
        with pytest.raises(ConfigError, match=r"does not work on experts.*lora\.experts false"):
            adapted("qwen3_moe", LoraConfig(**values))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_layer_computes_what_the_paper_says(rslora: bool) -> None:
    model = moved(adapted(config=replace(EVERYWHERE, rslora=rslora)))
    layer = model.get_submodule("model.vision_tower.encoder.layer.0.mlp.fc1")
    x = torch.randn(4, 24)
    a, b = (getattr(layer, f"lora_{letter}").default.weight for letter in "AB")
    assert a.shape == (3, 24)
    scale = 5 / 3**0.5 if rslora else 5 / 3
    by_hand = torch.stack(
        [
            layer.base_layer.weight @ row + layer.base_layer.bias + scale * (b @ (a @ row))
            for row in x
        ]
    )
    torch.testing.assert_close(layer(x), by_hand, rtol=0, atol=1e-5)


def test_alpha_is_twice_the_rank_unless_given() -> None:
    layer = adapted(config=LoraConfig(rank=4)).get_submodule(
        "model.language_model.layers.0.self_attn.q_proj"
    )
    assert layer.scaling == {"default": 2.0}


@pytest.mark.parametrize("name", ["qwen2", "internlm2", *MIXTURES])
def test_switched_off_the_model_is_its_base_bit_for_bit(name: str) -> None:
    before = scores(body_model(name))
    model = moved(adapted(name))
    after = scores(model)
    assert not torch.allclose(after, before, atol=1e-3)
    flags = [p.requires_grad for p in model.parameters()]
    with adapters_off(model):
        assert torch.equal(scores(model), before)
    assert torch.equal(scores(model), after)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_drop_path_and_dropout_of_adapters_are_off_together() -> None:
    model = moved(adapted(config=replace(EVERYWHERE, dropout=0.5)))
    expected = scores(model)
    model.train()
    assert not torch.equal(scores(model), expected)
    with model.no_drop_path():
        assert torch.equal(scores(model), expected)
        model.train()  # as a training loop does at every step
        assert torch.equal(scores(model), expected)
    assert not torch.equal(scores(model), expected)


@pytest.mark.parametrize("name", ["qwen3", *MIXTURES])
def test_checkpointing_changes_no_gradient_and_only_adapters_have_one(name: str) -> None:
    gradients = []
    batch = packed_batch([[1], [2]])
    for checkpointing in (False, True):
        model = moved(adapted(name)).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)
        model(batch=batch, head_fn=head(batch)).sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == adapter_parameters(model).keys()
        assert all(float(grad.abs().max()) > 0 for grad in found.values())
        gradients.append(found)
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-5, atol=1e-6)


def test_adapters_of_a_seed_are_the_same_and_leave_the_generator_alone() -> None:
    torch.manual_seed(3)
    first = adapter_parameters(adapted())
    drawn = torch.rand(1)
    torch.manual_seed(4)
    again = adapter_parameters(adapted())
    assert all(torch.equal(first[name], again[name]) for name in first)
    torch.manual_seed(3)
    body_model("qwen3")
    assert torch.equal(drawn, torch.rand(1))


def test_bfloat16_adapters_have_float32_masters() -> None:
    model = body_model("qwen3")
    make_trainable(
        model, ModelConfig(precision="bfloat16"), Accelerator(cpu=True), lora=LoraConfig(), seed=0
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    optimiser = Optimiser(model.named_parameters(), TrainConfig().optim)
    assert optimiser.masters.keys() == adapter_parameters(model).keys()
    assert {master.dtype for master in optimiser.masters.values()} == {torch.float32}


class NoData:
    """A stream that nobody reads."""

    def __next__(self) -> Batch:
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        del state


def test_text_alone_teaches_a_vision_tower_nothing() -> None:
    model = adapted(config=LoraConfig(parts=("vision",)))
    state: TrainState[Batch] = TrainState(
        model=model,
        optimiser=Optimiser(model.named_parameters(), TrainConfig().optim),
        stream=NoData(),
        accelerator=Accelerator(cpu=True),
    )
    update(state, [packed_batch([[]])], NEXT_TOKEN)
    assert state.metrics["grad_norm"] == 0
    update(state, [packed_batch([[]]), packed_batch([[1]])], NEXT_TOKEN)
    assert state.metrics["grad_norm"] > 0


def test_the_warm_up_of_the_post_hoc_route_has_no_adapters() -> None:
    config = PosthocConfig(lora=LoraConfig())
    assert warmup_of(config, []).lora is None


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained nano."""
    out = tmp_path_factory.mktemp("lora") / "pretrain"
    config = small_config(out, run__num_steps=1, model__precision="bfloat16")
    pretrain(config, sources=sources(), tokenizer=tokenizer(), console=QUIET)
    return out / "model"


def lora_config(base: Path, out: Path, lora: LoraConfig | None = None, **values: Any) -> Any:
    everywhere = LoraConfig(parts=("vision", "projector", "language"), rank=4)
    settings = {
        "model__preset": None,
        "model__path": str(base),
        "model__precision": "bfloat16",
        "model__drop_path": 0.3,
        "model__gradient_checkpointing": True,
        "data__increment": "random",
        "run__num_steps": 4,
        **values,
    }
    return replace(small_config(out, **settings), lora=lora or everywhere)


def test_a_run_that_crashed_goes_on_as_if_nothing_happened(base: Path, tmp_path: Path) -> None:
    sft(lora_config(base, tmp_path / "whole"), sources=sources(), console=QUIET)
    crashing = lora_config(base, tmp_path / "run", run__eval_interval=1)
    with pytest.raises(MemoryError):
        sft(crashing, sources=sources(), on_step=crashing_at(3), console=QUIET)
    going_on = lora_config(base, tmp_path / "run", run__resume=True)
    result = sft(going_on, sources=sources(), console=QUIET)
    assert result.finished
    assert differing(tmp_path / "whole", tmp_path / "run", 4) == []
    kept = final_tensors(tmp_path / "run", 4, ["weights"])
    names = [key.removeprefix("weights:") for key in kept]
    assert names
    assert all(is_adapter(name) for name in names)  # a checkpoint holds no base weight
    adapters = ("adapter_model.safetensors", "adapter_config.json", "cascadevl_adapter.json")
    for file in adapters:
        one, other = ((tmp_path / run / "adapter" / file).read_bytes() for run in ("whole", "run"))
        assert one == other

    # On another base of the same shape it is refused.
    model, processor = cascadevl.load(base)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    cascadevl.model.loading.save(model, processor, tmp_path / "other")
    saved = tmp_path / "run" / "checkpoints" / "checkpoint-00000004" / "state.json"
    facts = json.loads(saved.read_text())
    facts["config"]["model"]["path"] = str(tmp_path / "other")
    saved.write_text(json.dumps(facts))
    other_base = lora_config(tmp_path / "other", tmp_path / "run", run__resume=True)
    with pytest.raises(TrainingError, match="base_fingerprint was"):
        sft(other_base, sources=sources(), console=QUIET)


def test_only_adapters_learn_and_both_folders_hold_the_same_model(
    base: Path, tmp_path: Path
) -> None:
    config = lora_config(
        base,
        tmp_path / "run",
        LoraConfig(rank=4, parts=("projector", "language")),
        model__precision="float32",
        model__frozen=("projector",),
        optim__lr=1e-2,
    )
    result = sft(config, sources=sources(), console=QUIET)
    assert result.model_path == tmp_path / "run" / "model"
    assert result.adapter_path == tmp_path / "run" / "adapter"
    before, _ = cascadevl.load(base, dtype=torch.float32)
    merged, _ = cascadevl.load(tmp_path / "run" / "model")
    beside, _ = cascadevl.load(tmp_path / "run" / "adapter", dtype=torch.float32)
    own = dict(beside.named_parameters())
    for name, old in before.named_parameters():
        is_target = ".layers." in name and name.endswith("_proj.weight")
        assert torch.equal(old, merged.get_parameter(name)) != is_target, name
        kept = own[name.replace(".weight", ".base_layer.weight") if is_target else name]
        assert torch.equal(old, kept), name
    assert (merged.config.increment, merged.config.trained_context) == ("auto", 4096)
    assert (beside.config.increment, beside.config.trained_context) == ("auto", 4096)
    losses = [line["loss"] for line in logged(tmp_path / "run")]
    assert losses[-1] < losses[0]


def test_without_a_merge_the_adapter_is_the_result(base: Path, tmp_path: Path) -> None:
    config = lora_config(base, tmp_path / "run", LoraConfig(merge=False), run__num_steps=1)
    result = sft(config, sources=sources(), console=QUIET)
    assert result.model_path == result.adapter_path == tmp_path / "run" / "adapter"
    assert not (tmp_path / "run" / "model").exists()
    again = lora_config(base, tmp_path / "again", model__path=str(result.adapter_path))
    with pytest.raises(ConfigError, match=r"an adapter; training starts from a model: merge"):
        sft(again, sources=sources(), console=QUIET)


def test_random_weights_are_not_adapted(tmp_path: Path) -> None:
    config = replace(small_config(tmp_path), lora=LoraConfig())
    with pytest.raises(ConfigError, match=r"preset 'nano' starts from random weights"):
        pretrain(config, sources=sources(), tokenizer=tokenizer(), console=QUIET)


def test_the_published_configuration_has_the_released_values() -> None:
    file = Path(__file__).parents[2] / "configs" / "sft_lora_internvl3-1b.yaml"
    config = load_config(TrainConfig, files=[file])
    assert config.lora == LoraConfig(alpha=32, dropout=0.05)
    assert (config.optim.lr, config.run.global_batch) == (4e-5, 16)
