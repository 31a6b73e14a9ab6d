"""Packed models against the models they were made of, on every text body."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Literal

import pytest
import torch
from tests.engine.small_backend import checkpoint
from tests.model.bodies import BODIES, body_model
from tests.train.test_lora import moved
from torch import Tensor, nn
from torch.nn import functional as F

from cascadevl.engine.int8_linear import Int8Linear
from cascadevl.engine.joined_linear import PartOfJoined
from cascadevl.engine.packed_weights import PackedLinear, PackedModel, can_pack, held, pack
from cascadevl.errors import CheckpointError, ConfigError
from cascadevl.model.adapters import merged_tensors
from cascadevl.model.loading import load
from cascadevl.model.modeling import CascadeVLForConditionalGeneration as Model
from cascadevl.model.vision_half import load_vision_half
from cascadevl.train.lora import LoraConfig, add_adapters

HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
Precision = Literal["packed", "int8"]


def tied_model(seed: int = 0) -> Model:
    model = body_model("qwen2", seed=seed, tie_word_embeddings=True)
    model.config.text_config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    return model


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
def logits(model: Model) -> Tensor:
    """Of two short rows without pictures."""
    width = model.config.text_config.hidden_size
    embeds = drawn(2, 9, width, seed=3, dtype=model.get_input_embeddings().weight.dtype)
    return model.decode(embeds, torch.arange(9.0).expand(2, 9)).logits


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def assert_same(packed: PackedModel, model: Model) -> None:
    """Equal up to rounding: float32, or the scale of int8."""
    if packed.precision == "packed":
        torch.testing.assert_close(logits(packed.model), logits(model), rtol=1e-5, atol=1e-5)
    else:
        assert distance(logits(packed.model), logits(model)) < 0.02


@torch.no_grad()
def assert_same_features(ours: Model, theirs: Model, tiles: Tensor) -> None:
    found, wanted = ours.encode_images(tiles), theirs.encode_images(tiles)
    assert found.projected is not None
    torch.testing.assert_close(found.projected, wanted.projected, rtol=1e-5, atol=1e-5)


def trained_a_step(model: Model) -> None:
    """Move every weight by some of itself, in place, as an optimiser does."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


# One layer.


@pytest.mark.parametrize(("out_features", "in_features"), [(64, 192), (512, 192), (33, 17)])
@pytest.mark.parametrize("num_rows", [0, 1, 4, 16, 100])
def test_a_packed_layer_gives_what_linear_gives(out_features: int, in_features: int, num_rows: int):
    bounds = {torch.bfloat16: 2.0**-7, torch.float32: 1e-5}  # one rounding to a neighbour
    for dtype, bound in bounds.items():
        weight = drawn(out_features, in_features, dtype=dtype)
        bias = drawn(out_features, seed=1, dtype=dtype)
        x = drawn(2, num_rows, in_features, seed=2, dtype=dtype)
        for given in (bias, None):
            wanted = F.linear(x, weight, given)
            out = PackedLinear(weight, given)(x)
            torch.testing.assert_close(out, wanted, rtol=bound, atol=bound)


def test_a_row_alone_gives_what_it_gives_among_others():
    for dtype, bound in ((torch.bfloat16, 2.0**-7), (torch.float32, 1e-6)):
        layer = PackedLinear(drawn(96, 64, dtype=dtype), None)
        x = drawn(50, 64, seed=1, dtype=dtype)
        alone = torch.cat([layer(row[None]) for row in x])
        torch.testing.assert_close(layer(x), alone, rtol=bound, atol=bound)


def test_a_packed_weight_is_a_copy():
    weight, bias, x = drawn(17, 33), drawn(17, seed=1), drawn(4, 33, seed=2)
    layer = PackedLinear(weight, bias)
    before = layer(x)
    weight.zero_()
    bias.zero_()
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)


def test_another_type_and_gradients_are_refused():
    layer = PackedLinear(drawn(8, 16, dtype=torch.bfloat16), None)
    with pytest.raises(ValueError, match=r"packed in torch\.bfloat16 was given torch\.float32"):
        layer(drawn(2, 16))
    with pytest.raises(ValueError, match="have no gradient"):
        layer(drawn(2, 16, dtype=torch.bfloat16).requires_grad_())


# A whole model.


@pytest.mark.parametrize("precision", ["packed", "int8"])
@pytest.mark.parametrize("body", BODIES)
def test_every_body_answers_as_before_and_is_not_touched(body: str, precision: Precision):
    model = body_model(body)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    packed = pack(model, precision)
    assert_same(packed, model)
    assert type(packed.model) is type(model)
    for name, parameter in model.named_parameters():
        identity, value = before[name]
        assert id(parameter) == identity
        assert torch.equal(parameter, value)
        assert parameter.requires_grad


@pytest.mark.parametrize("body", ["qwen2", "qwen3_moe", "gpt_oss"])
def test_what_is_not_packed_is_shared(body: str):
    model = body_model(body)
    packed = pack(model, "packed")
    theirs = dict(packed.model.named_parameters())
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert set(packed.layers) == linear
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in linear:
            assert theirs.pop(name) is parameter  # fused experts and routers among them
    assert not theirs


def test_the_model_goes_on_training_and_its_settings_are_its_own():
    model = body_model("qwen2").train()
    packed = pack(model, "packed")
    assert not any(module.training for module in packed.model.modules())
    assert all(module.training for module in model.modules())
    assert packed.model.config is not model.config
    assert packed.model.model.language_model.config is not model.model.language_model.config
    embeds = drawn(1, 5, 32)
    model.decode(embeds, torch.arange(5.0)[None]).logits.sum().backward()
    assert all(p.grad is not None for p in model.model.language_model.layers.parameters())


@pytest.mark.parametrize("precision", ["packed", "int8"])
def test_new_weights_of_the_model_are_taken_over(precision: Precision):
    model = body_model("qwen3")
    packed = pack(model, precision)
    layers = dict(packed.layers)
    trained_a_step(model)
    assert distance(logits(packed.model), logits(model)) > 0.1
    packed.refresh(model)
    assert_same(packed, model)
    assert all(packed.layers[name] is layer for name, layer in layers.items())
    shared = dict(packed.model.named_parameters())
    assert all(shared.get(name, p) is p for name, p in model.named_parameters())


@pytest.mark.parametrize("precision", ["packed", "int8"])
def test_packed_in_one_mode_and_refreshed_in_another(precision: Precision):
    model, other = body_model("qwen2"), body_model("qwen2", seed=1)
    with torch.inference_mode():
        packed = pack(model, precision)
        logits(packed.model)
    packed.refresh(other)
    assert_same(packed, other)
    with torch.inference_mode():
        packed.refresh(model)
    packed.refresh(model)
    assert_same(packed, model)


@pytest.mark.parametrize("with_head", [True, False])
def test_weights_of_another_model_do_not_reach_the_first(with_head: bool):
    model, other = tied_model(), tied_model(seed=1)
    before = logits(model)
    packed = pack(model, "packed")
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    if not with_head:
        del state[HEAD]  # as files of a tied model have it
    packed.refresh(state)
    assert_same(packed, other)
    ours = packed.model.model.language_model.embed_tokens.weight
    assert torch.equal(ours, state[EMBEDDING])
    assert ours.data_ptr() != state[EMBEDDING].data_ptr()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_weights_of_float32_masters_are_taken_in_the_packed_type():
    model, masters = body_model("qwen2").to(torch.bfloat16), body_model("qwen2", seed=1)
    packed = pack(model, "packed")
    packed.refresh(masters)
    wanted = logits(masters.to(torch.bfloat16))
    torch.testing.assert_close(logits(packed.model), wanted, rtol=2.0**-6, atol=2.0**-6)


@pytest.mark.parametrize("precision", ["packed", "int8"])
def test_released_weights_are_freed_and_counted(precision: Precision):
    model, other = tied_model(), tied_model(seed=1)
    wanted = logits(model)
    head = model.lm_head.weight.nbytes
    linear = [m for m in model.model.modules() if isinstance(m, nn.Linear)]
    num_bytes = sum(p.nbytes for m in linear for p in m.parameters())
    gone = [weakref.ref(m.weight) for m in linear]
    del linear
    packed = pack(model, precision, release=True)
    assert packed.model is model
    assert all(ref() is None for ref in gone)
    assert packed.size.plain == num_bytes + head
    assert packed.size.released == num_bytes  # the tied head's table is the token embedding
    assert distance(logits(model), wanted) < (1e-5 if precision == "packed" else 0.02)
    table = model.get_input_embeddings().weight
    packed.refresh(other.state_dict())
    assert_same(packed, other)
    assert model.get_input_embeddings().weight is table  # copied into


def test_bytes_of_an_int8_language_half_are_half_of_bfloat16():
    model = body_model("qwen3").to(torch.bfloat16)
    packed = pack(model, "int8")
    size = packed.size
    language = {n: each for n, each in packed.layers.items() if "language" in n or "head" in n}
    plain = sum(p.nbytes for name in language for p in model.get_submodule(name).parameters())
    biases_and_scales = sum(each.num_bytes for each in language.values()) - plain // 2
    assert 0 < biases_and_scales < 0.1 * plain
    assert plain < size.plain
    assert size.released == 0
    assert size.left == sum(p.nbytes for p in model.parameters()) - size.plain


@pytest.mark.parametrize("precision", ["packed", "int8"])
def test_a_packed_vision_half_sees_the_same_and_takes_new_weights(precision: Precision):
    model, other = body_model("qwen2"), body_model("qwen2", seed=1)
    packed = pack(model, precision)
    tiles = drawn(3, 3, *[model.config.tile_px] * 2)
    for source in (model, other):
        packed.refresh(source)
        assert_same_features(packed.model, source, tiles)
    names = [name for name in packed.layers if name.startswith("model.vision_tower.")]
    assert len(names) == 6 * model.config.vision_config.num_hidden_layers
    assert all(type(packed.layers[name]) in (PackedLinear, PartOfJoined) for name in names)


def test_a_model_is_held_as_stored_or_packed_in_place():
    model = body_model("qwen2")
    assert held(model, "stored") is model
    assert type(model.lm_head) is nn.Linear
    packed = held(model, "packed")
    assert isinstance(packed, PackedModel)
    assert packed.model is model
    assert type(model.lm_head) is PackedLinear


@pytest.mark.parametrize("precision", ["packed", "int8"])
def test_a_vision_half_alone_is_packed(precision: Precision, tmp_path: Path):
    folder = checkpoint(tmp_path / "small")
    whole, _ = load(folder, dtype=torch.float32)
    half, _ = load_vision_half(folder, dtype=torch.float32)
    packed = pack(half, precision, release=True)
    assert not any(name.startswith(("model.language_model.", "lm_head")) for name in packed.layers)
    assert_same_features(half, whole, drawn(2, 3, *[whole.config.tile_px] * 2))


def test_the_head_may_be_packed_otherwise():
    model = body_model("qwen2")
    packed = pack(model, "packed", head="int8")
    kinds = {name: type(layer) for name, layer in packed.layers.items()}
    assert kinds.pop("lm_head") is Int8Linear
    assert set(kinds.values()) == {PackedLinear, PartOfJoined}
    assert (packed.precision, packed.head) == ("packed", "int8")
    hidden = drawn(3, 32)
    with torch.no_grad():
        wanted = model.lm_head(hidden)
        assert 0 < distance(packed.model.lm_head(hidden), wanted) < 0.02
    packed.refresh(body_model("qwen2", seed=1))


# What is refused.


@pytest.mark.parametrize("body", ["qwen3", "qwen3_moe"])
def test_adapters_reach_a_packed_copy_of_their_base(body: str):
    model = body_model(body)
    packed = pack(model, "packed")
    add_adapters(model, LoraConfig(parts=("vision", "language")), seed=0)
    assert_same(packed, model.eval())
    moved(model)
    assert distance(logits(packed.model), logits(model)) > 0.01
    packed.refresh(merged_tensors(model))
    assert_same(packed, model)
    with pytest.raises(ConfigError, match="has adapters; pack it before"):
        pack(model, "packed")


def test_a_state_that_does_not_fit_changes_nothing():
    model = body_model("qwen2")
    packed = pack(model, "packed")
    before = logits(packed.model)
    state = body_model("qwen2", seed=1).state_dict()
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match="lack 1 tensors .* for example " + name):
        packed.refresh({key: value for key, value in state.items() if key != name})
    with pytest.raises(CheckpointError, match=r"have 1 that .* for example extra"):
        packed.refresh(state | {"extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"\(48, 31\) in the new weights and \(48, 32\)"):
        packed.refresh(state | {name: torch.zeros(48, 31)})
    torch.testing.assert_close(logits(packed.model), before, rtol=0, atol=0)


def test_models_that_cannot_be_packed_are_refused():
    half = body_model("qwen2").to(torch.float16)
    assert not can_pack(half)
    with pytest.raises(ConfigError, match=r"the weights are torch\.float16"):
        pack(half, "packed")
    elsewhere = body_model("qwen2").to("meta")
    assert not can_pack(elsewhere)
    with pytest.raises(ConfigError, match="the model is on meta"):
        pack(elsewhere, "int8")
    assert can_pack(body_model("qwen2"))
