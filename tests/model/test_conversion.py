from __future__ import annotations

import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model import make_checkpoints as make
from torch import Tensor

from cascadevl.errors import CheckpointError
from cascadevl.model.checkpoint_names import (
    Layout,
    detect_layout,
    from_hub,
    fuse_experts,
    split_experts,
    through,
    to_hub,
)
from cascadevl.model.config_files import ORIGIN_KEY, github_config, hf_config
from cascadevl.model.conversion import convert
from cascadevl.model.internlm import FusedAttention
from cascadevl.model.tensor_files import TensorFiles, new_folder, plan_shards, write_tensors

FUSED = FusedAttention(num_key_value_heads=2, num_groups=2)
ALL_PAIRS = [(family, vision) for family in make.FAMILIES for vision in make.VISIONS]


def stored(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
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
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


# Names and values, against the tables written by hand in make_checkpoints.


@pytest.mark.parametrize(("family", "vision"), ALL_PAIRS)
def test_github_tensors_become_those_of_both_hf_layouts(family: str, vision: str) -> None:
    github = make.github_tensors(family, vision)
    hub = to_hub(github, "github", FUSED if family == "internlm2" else None)
    assert hub.unknown == ()
    read = through(github.__getitem__, hub.recipes)
    expected = make.hf_tensors(github)
    assert_same({name: read(name) for name in hub.recipes}, expected)

    old = from_hub(hub.recipes, "hf_old")
    read_old = through(read, old.recipes)
    assert_same({name: read_old(name) for name in old.recipes}, make.old_hf_tensors(expected))


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "gpt_oss"])
def test_layouts_are_told_apart_by_their_names(family: str) -> None:
    github = make.github_tensors(family)
    hf = make.hf_tensors(github)
    assert detect_layout(github) == "github"
    assert detect_layout(hf) == "hf"
    assert detect_layout(make.old_hf_tensors(hf)) == "hf_old"
    assert detect_layout({**github, **hf}) is None
    assert detect_layout(["model.embed_tokens.weight"]) is None


def test_experts_are_stacked_for_the_module_and_taken_apart_for_files() -> None:
    hf = make.hf_tensors(make.github_tensors("qwen3_moe"))
    fuse = fuse_experts(hf)
    read = through(hf.__getitem__, fuse)
    module = {name: read(name) for name in fuse}
    assert_same(module, make.module_tensors(hf))

    split = split_experts({name: tuple(tensor.shape) for name, tensor in module.items()})
    read_back = through(module.__getitem__, split)
    assert_same({name: read_back(name) for name in split}, hf)


def test_gpt_oss_experts_are_left_as_the_files_have_them() -> None:
    hf = make.hf_tensors(make.github_tensors("gpt_oss"))
    assert set(fuse_experts(hf)) == set(hf)
    assert set(split_experts({name: tuple(tensor.shape) for name, tensor in hf.items()})) == set(hf)


def test_a_split_tensor_does_not_keep_the_fused_one_in_memory() -> None:
    github = make.github_tensors("internlm2")
    hub = to_hub(github, "github", FUSED)
    read = through(github.__getitem__, hub.recipes)
    for name in hub.recipes:
        if "_proj" in name and "attn" in name.replace("attention", "attn"):
            tensor = read(name)
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


# Whole folders.


@pytest.mark.parametrize(("family", "vision"), make.BODIES)
def test_there_and_back_is_the_same_tensor_by_tensor_and_key_by_key(
    tmp_path: Path, family: str, vision: str
) -> None:
    # The settings that are independent of each other vary together, to save time.
    tied, num_files = vision == "300M", 1 if vision == "300M" else 3
    shard_bytes = 5_000_000_000 if vision == "300M" else 20_000
    source = make.write_github(tmp_path / "github", family, vision, tied=tied, num_files=num_files)
    convert(source, tmp_path / "hf", layout="hf", max_shard_bytes=shard_bytes)
    assert_same(stored(tmp_path / "hf"), make.hf_tensors(stored(source)))
    convert(tmp_path / "hf", tmp_path / "back", layout="github")
    assert_same(stored(tmp_path / "back"), stored(source))
    assert config_of(tmp_path / "back") == config_of(source)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "gpt_oss", "internlm2"])
@pytest.mark.parametrize("layout", ["hf", "hf_old"])
def test_hf_checkpoint_goes_to_github_and_back(tmp_path: Path, family: str, layout: Layout) -> None:
    hf = make.hf_tensors(make.github_tensors(family))
    tensors = hf if layout == "hf" else make.old_hf_tensors(hf)
    source = make.write(tmp_path / "source", tensors, make.hf_config(family))
    convert(source, tmp_path / "github", layout="github")
    convert(tmp_path / "github", tmp_path / "back", layout=layout)
    assert_same(stored(tmp_path / "back"), tensors)
    assert config_of(tmp_path / "back") == config_of(source)


def test_between_the_hf_styles_only_names_change(tmp_path: Path) -> None:
    hf = make.hf_tensors(make.github_tensors("qwen3"))
    source = make.write(tmp_path / "source", hf, make.hf_config("qwen3"))
    convert(source, tmp_path / "old", layout="hf_old")
    assert_same(stored(tmp_path / "old"), make.old_hf_tensors(hf))


def test_bfloat16_and_mixed_types_are_kept(tmp_path: Path) -> None:
    tensors = {
        name: tensor.bfloat16() if "language" in name else tensor.half()
        for name, tensor in make.github_tensors("internlm2").items()
    }
    source = make.write(tmp_path / "github", tensors, make.github_config("internlm2"))
    convert(source, tmp_path / "hf", layout="hf")
    assert_same(stored(tmp_path / "hf"), make.hf_tensors(tensors))


def test_converted_repository_has_the_files_a_released_one_has(tmp_path: Path) -> None:
    source = make.write_github(tmp_path / "github", "qwen3")
    (source / "modeling_internvl_chat.py").write_text("raise SystemExit('remote code was run')")
    (source / "generation_config.json").write_text('{"eos_token_id": 9, "max_new_tokens": 77}')
    convert(source, tmp_path / "hf", layout="hf")
    names = {file.name for file in (tmp_path / "hf").iterdir()}
    assert names >= {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
        *("chat_template.jinja", "generation_config.json", "modeling_internvl_chat.py"),
    }
    video = json.loads((tmp_path / "hf" / "video_preprocessor_config.json").read_text())
    assert video["size"] == {"height": make.TILE_PX, "width": make.TILE_PX}
    assert video["image_mean"] == [0.485, 0.456, 0.406]
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    turn_end = make.tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert set(generation["eos_token_id"]) == {9, 0, turn_end}
    assert generation["max_new_tokens"] == 77


def test_what_is_in_config_json_of_the_target() -> None:
    github = make.github_config("internlm2", "6B", ps_version="v1", max_dynamic_patch=24)
    config = hf_config(github, image_token_id=7, tied=False)
    assert config["image_token_id"] == 7
    assert config["ps_version"] == "v1"
    assert config["max_tiles"] == 24
    assert config["image_seq_length"] == make.TOKENS_PER_TILE
    assert config["drop_path_rate"] == 0.1
    assert config["vision_config"]["use_qk_norm"] is True
    assert config["vision_config"]["attention_bias"] is False
    assert config["text_config"]["model_type"] == "llama"
    assert config["text_config"]["rope_scaling"]["type"] == "dynamic"
    assert not {"auto_map", "num_beams", "_name_or_path"} & config["text_config"].keys()


def test_a_silent_github_config_gets_the_released_class_defaults() -> None:
    github = make.github_config("qwen2")
    for key in ("ps_version", "dynamic_image_size", "max_dynamic_patch", "template"):
        del github[key]
    config = hf_config(github, image_token_id=7, tied=False)
    assert config["ps_version"] == "v1"
    assert (config["max_tiles"], config["use_thumbnail"]) == (1, False)
    assert config["template"] == "internvl2_5"


def test_a_change_made_in_between_wins_over_the_kept_original() -> None:
    github = make.github_config("internlm2", custom_key="theirs")
    config = hf_config(github, image_token_id=7, tied=False)
    config |= {"max_tiles": 3, "ps_version": "v1"}
    back = github_config(config, tied=False)
    assert (back["max_dynamic_patch"], back["ps_version"]) == (3, "v1")
    assert back["custom_key"] == "theirs"
    assert back["llm_config"]["architectures"] == ["InternLM2ForCausalLM"]
    assert back["llm_config"]["bias"] is False
    assert ORIGIN_KEY in back


def test_configuration_of_transformers_5_keeps_its_rotary_settings() -> None:
    config = make.hf_config("qwen3")
    del config["text_config"]["rope_theta"]
    config["text_config"]["rope_parameters"] = {
        "rope_type": "dynamic",
        "factor": 2.0,
        "rope_theta": 5e6,
    }
    llm = github_config(config, tied=False)["llm_config"]
    assert llm["rope_theta"] == 5e6
    assert llm["rope_scaling"] == {"rope_type": "dynamic", "factor": 2.0}


# Shards and files.


def test_shards_are_filled_in_order_up_to_the_limit() -> None:
    sizes = {"a": 40, "b": 60, "c": 1, "d": 500, "e": 100}
    outline = {
        name: torch.empty(size, dtype=torch.int8, device="meta") for name, size in sizes.items()
    }
    shards = plan_shards(list(sizes), outline.__getitem__, 100)
    assert shards == [["a", "b"], ["c"], ["d"], ["e"]]


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def read(_: str) -> Tensor:
        nonlocal most
        tensor = torch.zeros(100)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    outline = torch.empty(100, device="meta")
    names = [f"t{number:02d}" for number in range(12)]
    write_tensors(tmp_path, names, read, lambda _: outline, max_shard_bytes=1200)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert most == 3


def test_index_names_every_tensor_and_its_file(tmp_path: Path) -> None:
    source = make.write_github(tmp_path / "github", "qwen3")
    convert(source, tmp_path / "hf", layout="hf", max_shard_bytes=30_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    tensors = stored(tmp_path / "hf")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name in tensors:
        assert name in load_file(tmp_path / "hf" / index["weight_map"][name])


def test_shards_without_an_index_are_read_too(tmp_path: Path) -> None:
    source = make.write_github(tmp_path / "github", "qwen3", num_files=2)
    (source / "model.safetensors.index.json").unlink()
    assert set(TensorFiles.open(source).places) == set(make.github_tensors("qwen3"))


# Refusals.


def broken(path: Path, change: str) -> Path:
    tensors = make.github_tensors("internlm2" if change == "fused" else "qwen3")
    family = "internlm2" if change == "fused" else "qwen3"
    layer = "vision_model.encoder.layers.0"
    if change == "missing":
        del tensors[f"{layer}.attn.qkv.weight"], tensors["mlp1.1.bias"]
    if change == "unexpected":
        tensors["vision_model.head.weight"] = torch.zeros(2)
        tensors["language_model.model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
    if change == "misshapen":
        tensors["mlp1.1.weight"] = torch.zeros(32, 60)
    if change == "thirds":
        tensors[f"{layer}.attn.qkv.weight"] = torch.zeros(47, 16)
    if change == "fused":
        name = "language_model.model.layers.1.attention.wqkv.weight"
        tensors[name] = torch.zeros(63, 32)
    return make.write(path, tensors, make.github_config(family))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"4 missing \(.*layer\.0\.attention\.q_proj\.weight.*and 1 more\)"),
        ("unexpected", r"2 unexpected \(vision_model\.head\.weight, .*layers\.7\.mlp\.up_proj"),
        ("misshapen", r"1 misshapen \(.*linear_1\.weight is \(32, 60\) but should be \(32, 64\)\)"),
        ("thirds", r"1 misshapen \(.*layer\.0\.attention\.v_proj\.weight is \(15, 16\)"),
        ("fused", r"3 misshapen \(.*layers\.1\.self_attn\.q_proj\.weight is None"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: str, message: str) -> None:
    source = broken(tmp_path / "source", change)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "target", layout="hf")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["source"]


def test_quantised_experts_are_refused_with_the_way_out(tmp_path: Path) -> None:
    tensors = make.github_tensors("gpt_oss")
    name = "language_model.model.layers.0.mlp.experts.down_proj"
    del tensors[name]
    tensors |= {f"{name}_blocks": torch.zeros(2), f"{name}_scales": torch.zeros(2)}
    source = make.write(tmp_path / "source", tensors, make.github_config("gpt_oss"))
    with pytest.raises(CheckpointError, match="MXFP4"):
        convert(source, tmp_path / "target", layout="hf")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = make.write_github(tmp_path / "source", "qwen3")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").write_text("yes")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert(source, tmp_path / "target", layout="hf")
    assert (tmp_path / "target" / "precious").read_text() == "yes"


def test_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "target") as folder:
            (folder / "half").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "target").mkdir()  # an empty folder may be there
    with new_folder(tmp_path / "target") as folder:
        (folder / "whole").write_text("")
    assert [file.name for file in (tmp_path / "target").iterdir()] == ["whole"]
    assert [file.name for file in tmp_path.iterdir()] == ["target"]


def test_pickled_weights_are_refused_without_being_opened(tmp_path: Path) -> None:
    source = make.write_github(tmp_path / "source", "qwen3")
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(CheckpointError, match=r"pickled weights \(pytorch_model\.bin\).*save_file"):
        convert(source, tmp_path / "target", layout="hf")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "not a readable safetensors file"),
        ("lost", "1 of 3 files named in .* are missing, first model-00002"),
        ("index", "not an index of safetensors files"),
        ("twice", "is in both"),
        ("config", r"config\.json: not valid JSON"),
        ("no config", r"config\.json is missing"),
        ("list", "holds a list, not a JSON object"),
    ],
)
def test_damaged_folders_say_what_is_damaged(tmp_path: Path, damage: str, message: str) -> None:
    source = make.write_github(tmp_path / "source", "qwen3", num_files=3)
    second = source / "model-00002-of-00003.safetensors"
    if damage == "cut":
        os.truncate(second, second.stat().st_size // 2)
    if damage == "lost":
        second.unlink()
    if damage == "index":
        (source / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    if damage == "twice":
        (source / "model.safetensors.index.json").unlink()
        save_file(load_file(second), source / "other.safetensors")
    if damage == "config":
        (source / "config.json").write_text("{'a': 1}")
    if damage == "no config":
        (source / "config.json").unlink()
    if damage == "list":
        (source / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "target", layout="hf")


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    source = make.write(
        tmp_path / "source",
        {"model.embed_tokens.weight": torch.zeros(2, 2)},
        {"model_type": "qwen3", "text_config": {"model_type": "qwen3"}},
    )
    with pytest.raises(CheckpointError, match=r"neither .* model type 'qwen3', the first tensor"):
        convert(source, tmp_path / "target", layout="hf")


def test_unknown_language_model_is_refused_with_the_known_ones() -> None:
    github = make.github_config("qwen2")
    github["llm_config"] |= {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
    with pytest.raises(
        CheckpointError, match="'Phi3ForCausalLM' is not supported; supported: qwen2"
    ):
        hf_config(github, image_token_id=7, tied=False)
