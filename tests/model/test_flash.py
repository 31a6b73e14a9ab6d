"""Flash checkpoints in the released format: opened, routed and written back as their own code does.

The contract: names, thresholds, the layer used three times, the quantile over a request's tiles.
Held against `tests.reference.router_by_hand`, which computes in loops over floats.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.model import make_checkpoints as make
from tests.model import make_flash
from tests.model.flash_tiles import FULL, SMALL, TENSORS, chances_of, patches_of, pixels
from tests.model.small import PX, small_flash_model, small_model
from tests.reference import router_by_hand as by_hand
from torch import Tensor

from cascadevl.errors import CheckpointError, ConfigError, RequestError
from cascadevl.model.conversion import convert
from cascadevl.model.flash import add_flash
from cascadevl.model.language_half import load_language_half
from cascadevl.model.loading import load, save
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.routing import Thresholds, budget_for
from cascadevl.model.vision_half import load_vision_half


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flash.write_flash(tmp_path_factory.mktemp("flash") / "github")


@pytest.fixture(scope="module")
def model(released: Path) -> CascadeVLForConditionalGeneration:
    return load(released)[0]


def stored(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def config_of(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((path / "config.json").read_text())
    return values


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


# The router and the second projector, by hand.


def test_the_router_says_what_released_code_says(model: CascadeVLForConditionalGeneration) -> None:
    tiles = pixels()
    expected = [
        by_hand.probability(TENSORS, patches, heads=16) for patches in patches_of(model, tiles)
    ]
    assert chances_of(model, tiles) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.05  # tiles differ, or the test would say little


def test_the_second_layer_runs_three_times_in_released_weights(
    model: CascadeVLForConditionalGeneration, released: Path, tmp_path: Path
) -> None:
    tiles = pixels(3)
    meant = [
        by_hand.probability(TENSORS, each, heads=16, layers=by_hand.AS_MEANT)
        for each in patches_of(model, tiles)
    ]
    assert max(abs(a - b) for a, b in zip(meant, chances_of(model, tiles), strict=True)) > 1e-3
    own = make_flash.write_flash(tmp_path / "own", flash_layers="all")
    assert chances_of(load(own)[0], tiles) == pytest.approx(meant, abs=1e-5)


def test_both_projectors_by_hand(model: CascadeVLForConditionalGeneration) -> None:
    tiles = pixels(3)
    flags = [True, False, True]
    with torch.no_grad():
        features = model.encode_images(tiles)
        counts = [SMALL if flag else FULL for flag in flags]
        found = model.model.visual_tokens(features, counts)
    expected = [
        token
        for patches, flag in zip(patches_of(model, tiles), flags, strict=True)
        for token in by_hand.visual_tokens(TENSORS, patches, compress=flag)
    ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)


def test_only_the_projector_that_a_tile_needs_is_computed(
    model: CascadeVLForConditionalGeneration,
) -> None:
    seen: dict[str, list[int]] = {"full": [], "compressed": []}
    inner = model.model
    assert inner.compressed_projector is not None
    hooks = [
        part.register_forward_hook(lambda _, args, __, name=name: seen[name].append(len(args[0])))
        for name, part in (
            ("full", inner.multi_modal_projector),
            ("compressed", inner.compressed_projector),
        )
    ]
    with torch.no_grad():
        patches = inner.patch_features(pixels(5))
        for counts in ([FULL] * 5, [SMALL] * 5, [FULL, SMALL, SMALL, FULL, SMALL]):
            inner.project(patches, torch.tensor(counts))
    for hook in hooks:
        hook.remove()
    assert seen == {"full": [5, 2], "compressed": [5, 3]}


def test_tiles_of_another_number_of_tokens_are_refused(
    model: CascadeVLForConditionalGeneration,
) -> None:
    with torch.no_grad():
        features = model.encode_images(pixels(2))
        with pytest.raises(
            ValueError, match=r"\[2, 4\] visual tokens, but this model makes 4 or 1"
        ):
            model.model.visual_tokens(features, [4, 2])
        with pytest.raises(ValueError, match="3 numbers of visual tokens for 2 tiles"):
            model.model.visual_tokens(features, [4, 4, 1])


# Names and files.


def test_every_tensor_lands_under_its_name(
    model: CascadeVLForConditionalGeneration, released: Path
) -> None:
    assert_same(model.state_dict(), make_flash.hf_tensors(stored(released)))


@pytest.mark.parametrize("layout", ["hf", "hf_old"])
def test_converted_there_and_back_to_the_last_bit(
    released: Path, tmp_path: Path, layout: Any
) -> None:
    convert(released, tmp_path / "hf", layout=layout, max_shard_bytes=20_000)
    there = config_of(tmp_path / "hf")
    assert there["flash_mode"] is True
    assert there["flash_layers"] == "released"
    assert there["architectures"] == ["CascadeVLForConditionalGeneration"]
    assert "router" in there["cascadevl_requires"]
    convert(tmp_path / "hf", tmp_path / "back", layout="github")
    assert_same(stored(tmp_path / "back"), stored(released))
    assert config_of(tmp_path / "back") == config_of(released)
    tiles = pixels(3)
    assert chances_of(load(tmp_path / "hf")[0], tiles) == chances_of(load(released)[0], tiles)


def test_saved_as_released_ones_are_it_is_the_same(released: Path, tmp_path: Path) -> None:
    save(*load(released), tmp_path / "github", layout="github")
    assert_same(stored(tmp_path / "github"), stored(released))
    keys = {key: value for key, value in config_of(tmp_path / "github").items() if "flash" in key}
    assert keys == make_flash.FLASH_KEYS
    save(*load(tmp_path / "github"), tmp_path / "hf")
    assert chances_of(load(tmp_path / "hf")[0], pixels()) == chances_of(load(released)[0], pixels())


def test_our_own_is_told_apart_in_the_released_format(tmp_path: Path) -> None:
    plain, processor = load(make.write_github(tmp_path / "plain", "qwen3"))
    add_flash(plain, seed=3, num_heads=8)
    save(plain, processor, tmp_path / "github", layout="github")
    model, _ = load(tmp_path / "github")
    config = model.config
    assert (config.flash_layers, config.flash_heads) == ("all", 8)
    assert config.flash_absolute_threshold is None
    assert chances_of(model, pixels()) == chances_of(plain, pixels())


def test_thresholds_come_from_the_configuration(released: Path, tmp_path: Path) -> None:
    model, _ = load(released)
    assert budget_for(model.config, None) == Thresholds(absolute=0.4, relative=0.7)
    other = make_flash.write_flash(tmp_path / "other", flash_relative_threshold=0.2)
    assert budget_for(load(other)[0].config, None) == Thresholds(absolute=0.4, relative=0.2)


@pytest.mark.parametrize("key", ["flash_relative_threshold", "flash_absolute_threshold"])
def test_missing_thresholds_are_asked_for(tmp_path: Path, key: str) -> None:
    config = make.github_config("qwen3", **make_flash.FLASH_KEYS)
    del config[key]
    source = make.write(tmp_path / "flash", make_flash.tensors_of(), config)
    with pytest.raises(CheckpointError, match=f"flash_mode is set.*but {key} are not"):
        load(source)


def test_a_flash_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    tensors = make_flash.tensors_of()
    del tensors["pooling_before_gating.attn4.in_proj_weight"]  # stored, though never used
    config = make.github_config("qwen3", **make_flash.FLASH_KEYS)
    with pytest.raises(CheckpointError, match=r"1 missing \(model\.router\.pooling\.3\.in_proj"):
        load(make.write(tmp_path / "flash", tensors, config))


@pytest.mark.parametrize("change", [{"flash_mode": False}, {"flash_mode": None}])
def test_a_router_that_is_switched_off_is_kept_but_not_loaded(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    source = make_flash.write_flash(tmp_path / "flash", **change)
    model, _ = load(source)
    assert model.model.router is None
    plain, _ = load(make.write_github(tmp_path / "plain", "qwen3"))
    assert_same(model.state_dict(), plain.state_dict())
    convert(source, tmp_path / "hf", layout="hf")
    assert load(tmp_path / "hf")[0].model.router is None
    convert(tmp_path / "hf", tmp_path / "back", layout="github")
    assert_same(stored(tmp_path / "back"), stored(source))
    assert config_of(tmp_path / "back") == config_of(source)


def test_the_vision_half_routes_too(released: Path) -> None:
    half, _ = load_vision_half(released)
    whole, _ = load(released)
    assert chances_of(half, pixels()) == chances_of(whole, pixels())


def test_the_language_half_opens_without_projectors_and_router(released: Path) -> None:
    half, _ = load_language_half(released)
    whole, _ = load(released)
    assert torch.equal(half.lm_head.weight, whole.lm_head.weight)
    with pytest.raises(RequestError, match="the router is not part of this process"):
        half.model.get_submodule("router")(torch.zeros(1, 16, 16))


# Models made here.


def test_a_plain_model_gets_a_router_and_answers_as_before() -> None:
    model, plain = small_model(), small_model()
    add_flash(model, seed=5, num_heads=3)
    generator = torch.Generator().manual_seed(2)
    tiles = torch.randn(2, 3, PX, PX, generator=generator)
    ids = torch.tensor([[9, 10, *[7] * 8, 11, 12]])
    with torch.no_grad():
        for wanted in (None, "full"):
            made = [
                each.generate(ids, pixel_values=tiles, max_new_tokens=4, visual_budget=wanted)
                for each in (model, plain)
            ]
            assert torch.equal(*made)
        expected = plain(input_ids=ids, pixel_values=tiles).logits
        assert torch.equal(model(input_ids=ids, pixel_values=tiles).logits, expected)
    other = small_model()
    add_flash(other, seed=6, num_heads=3)
    assert not torch.equal(other.model.router.gate.weight, model.model.router.gate.weight)
    with pytest.raises(ConfigError, match="already"):
        add_flash(model, seed=5)
    with pytest.raises(ConfigError, match="flash_heads is 16, which does not divide"):
        add_flash(small_model(), seed=5)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"flash_heads": 5}, "flash_heads is 5, which does not divide"),
        ({"flash_layers": "three"}, "flash_layers is 'three'"),
        ({"flash_relative_threshold": 0.5}, "needs flash_absolute_threshold"),
        ({"flash_relative_threshold": 1.5, "flash_absolute_threshold": 0.1}, "a share, 0 to 1"),
        ({"flash_downsample_ratio": 0.5}, "fewer than 4"),
        ({"flash_downsample_ratio": 0.125}, "makes whole tokens"),
    ],
)
def test_keys_that_mean_nothing_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small_flash_model(**keys)


def test_the_router_is_trained_only_where_it_is_asked_for() -> None:
    model = small_flash_model()
    model.freeze()
    assert not any(p.requires_grad for p in model.model.router.parameters())
    assert all(p.requires_grad for p in model.model.compressed_projector.parameters())
    model.freeze(vision=True, projector=True, language=True, router=False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("model.router.") for name in trained)
    model.model.router.logits(torch.randn(3, 16, 24)).sum().backward()
    dead = {name for name in trained if model.get_parameter(name).grad is None}
    assert dead == set()  # all four layers are used


def test_the_gradient_of_the_folded_attention_is_that_of_torchs() -> None:
    """nn.MultiheadAttention, which projects every patch, with its weights in our layer."""
    layer = small_flash_model().model.router.pooling[0].double()
    layer.norm = torch.nn.Identity()
    reference = torch.nn.MultiheadAttention(24, 3, batch_first=True).double()
    names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    reference.load_state_dict({name: layer.state_dict()[name] for name in names})
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(4, 24, generator=generator, dtype=torch.float64)
    patches = torch.randn(4, 9, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    expected, _ = reference(query[:, None], patches, patches)
    found = layer(query, patches)
    torch.testing.assert_close(found, expected[:, 0], rtol=0, atol=1e-12)
    weight = torch.randn(4, 24, generator=generator, dtype=torch.float64)
    wanted = [patches, *(reference.get_parameter(name) for name in names)]
    mine = [patches, *(layer.get_parameter(name) for name in names)]
    for theirs, ours in zip(
        torch.autograd.grad((expected[:, 0] * weight).sum(), wanted),
        torch.autograd.grad((found * weight).sum(), mine),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_bfloat16_routes_nearly_as_float32(released: Path) -> None:
    """Rounding moves a probability a little; a tile near a threshold may go the other way."""
    exact, rounded = load(released)[0], load(released, dtype=torch.bfloat16)[0]
    differences = [
        abs(a - b)
        for a, b in zip(chances_of(exact, pixels(20)), chances_of(rounded, pixels(20)), strict=True)
    ]
    assert max(differences) < 0.1
    assert math.fsum(differences) > 0
