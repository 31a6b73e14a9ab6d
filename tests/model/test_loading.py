from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model import make_checkpoints as make
from torch import Tensor

import cascadevl
from cascadevl.errors import CascadeVLError, CheckpointError
from cascadevl.model.loading import load, save


def question(num_tiles: int = 2) -> dict[str, Tensor]:
    """Two tiles somewhere in a text."""
    image = make.tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>")
    ids = [100, 101, *[image] * (make.TOKENS_PER_TILE * num_tiles), 107, 109, 120]
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(num_tiles, 3, make.TILE_PX, make.TILE_PX, generator=generator)
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(**question()).logits
    return result


@pytest.mark.parametrize(("family", "vision"), make.BODIES)
def test_github_checkpoint_answers_as_transformers_filled_by_hand(
    tmp_path: Path, family: str, vision: str
) -> None:
    tied = vision == "6B"
    source = make.write_github(tmp_path / "github", family, vision, tied=tied, num_files=2)
    model, processor = load(source)
    reference = make.reference_model(family, vision, tied=tied)
    torch.testing.assert_close(logits(model), logits(reference), atol=1e-5, rtol=1e-5)
    assert model.config.tie_word_embeddings is tied
    assert processor.tokens_per_tile == make.TOKENS_PER_TILE


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "gpt_oss", "llama"])
@pytest.mark.parametrize("style", ["hf", "hf_old"])
def test_both_hf_styles_load_the_same_weights(tmp_path: Path, family: str, style: str) -> None:
    hf = make.hf_tensors(make.github_tensors(family, "6B"))
    tensors = hf if style == "hf" else make.old_hf_tensors(hf)
    source = make.write(tmp_path / "hf", tensors, make.hf_config(family, "6B"), num_files=3)
    model, _ = load(source)
    expected = make.module_tensors(hf)
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def test_loading_is_the_first_line_of_the_readme(tmp_path: Path) -> None:
    source = make.write_github(tmp_path / "github", "qwen3")
    model, processor = cascadevl.load(str(source))
    assert not model.training
    assert processor.image_token_id == model.config.image_token_id
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_stored_head_is_honoured_though_the_configuration_ties_it(tmp_path: Path) -> None:
    config = make.github_config("qwen3", tie_word_embeddings=True)
    config["llm_config"]["tie_word_embeddings"] = True
    tensors = make.github_tensors("qwen3")
    model, _ = load(make.write(tmp_path / "github", tensors, config))
    assert torch.equal(model.lm_head.weight, tensors["language_model.lm_head.weight"])
    embedding = model.get_input_embeddings().weight
    assert not torch.equal(model.lm_head.weight, embedding)
    model.tie_weights()  # as training and saving do now and then
    assert model.lm_head.weight is not embedding


def test_absent_head_is_tied_though_the_configuration_does_not_say_so(tmp_path: Path) -> None:
    hf = make.hf_tensors(make.github_tensors("qwen2", tied=True))
    config = make.hf_config("qwen2", tie_word_embeddings=False)
    model, _ = load(make.write(tmp_path / "hf", hf, config))
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float32])
def test_type_of_weights_and_of_rotary_frequencies(tmp_path: Path, dtype: Any) -> None:
    tensors = {
        name: tensor.to(torch.bfloat16) for name, tensor in make.github_tensors("qwen3").items()
    }
    source = make.write(tmp_path / "github", tensors, make.github_config("qwen3"))
    model, _ = load(source, dtype=dtype)
    expected = torch.bfloat16 if dtype == "auto" else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    frequencies = model.model.language_model.rotary_emb.inv_freq
    reference = make.reference_model("qwen3").model.language_model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, reference)


def test_a_model_does_not_change_when_its_files_are_replaced(tmp_path: Path) -> None:
    source = make.write_github(tmp_path / "github", "qwen3")
    model, _ = load(source)
    before = logits(model)
    file = source / "model.safetensors"
    with file.open("r+b") as opened:  # the same inode, as a copy over the file would have
        opened.seek(file.stat().st_size // 2)
        opened.write(b"\xff" * (file.stat().st_size // 2))
    assert torch.equal(logits(model), before)


def test_pixel_shuffle_version_is_read_and_missing_means_v1(tmp_path: Path) -> None:
    config = make.github_config("qwen3")
    del config["ps_version"]
    tensors = make.github_tensors("qwen3")
    oldest, _ = load(make.write(tmp_path / "v1", tensors, config))
    usual, _ = load(make.write_github(tmp_path / "v2", "qwen3"))
    assert (oldest.config.ps_version, usual.config.ps_version) == ("v1", "v2")
    assert not torch.allclose(logits(oldest), logits(usual))


def test_settings_of_a_github_config_reach_model_and_processor(tmp_path: Path) -> None:
    config = make.github_config("qwen3", system_message="Be brief.", max_dynamic_patch=6)
    config |= {"use_thumbnail": False, "min_dynamic_patch": 2}
    source = make.write(tmp_path / "github", make.github_tensors("qwen3"), config)
    model, processor = load(source)
    tiling = processor.tiling
    assert (tiling.min_tiles, tiling.max_tiles, tiling.thumbnail) == (2, 6, False)
    assert tiling.tile_px == make.TILE_PX
    assert processor.system_message == "Be brief."
    settings = model.config
    assert (settings.min_tiles, settings.max_tiles, settings.use_thumbnail) == (2, 6, False)
    assert settings.system_message == "Be brief."


def test_wrong_video_settings_of_released_hf_repositories_do_no_harm(tmp_path: Path) -> None:
    hf = make.hf_tensors(make.github_tensors("qwen3"))
    source = make.write(tmp_path / "hf", hf, make.hf_config("qwen3"))
    wrong = {"size": {"height": 384, "width": 384}, "image_mean": [0.48, 0.46, 0.41]}
    (source / "video_preprocessor_config.json").write_text(json.dumps(wrong))
    model, processor = load(source)
    assert processor.tiling.tile_px == make.TILE_PX
    save(model, processor, tmp_path / "saved")
    mended = json.loads((tmp_path / "saved" / "video_preprocessor_config.json").read_text())
    assert mended["size"] == {"height": make.TILE_PX, "width": make.TILE_PX}
    assert mended["image_mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(
    ("family", "ends"), [("qwen3", ["<|im_end|>"]), ("gpt_oss", ["<|return|>", "<|call|>"])]
)
def test_answers_end_with_the_turn_and_with_what_the_files_name(
    tmp_path: Path, family: str, ends: list[str]
) -> None:
    model, processor = load(make.write_github(tmp_path / "github", family))
    expected = {0, *processor.tokenizer.convert_tokens_to_ids(ends)}
    assert set(model.generation_config.eos_token_id) == expected


def test_model_and_processor_generate_together(tmp_path: Path) -> None:
    model, processor = load(make.write_github(tmp_path / "github", "qwen3"))
    messages = [{"role": "user", "content": "What is written on the door?"}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert inputs["input_ids"].shape[1] < output.shape[1] <= inputs["input_ids"].shape[1] + 3


# Names and refusals.


def test_downloaded_repository_is_found_in_the_local_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make.write_github(tmp_path / "made", "qwen3")
    repository = tmp_path / "cache" / "models--OpenGVLab--InternVL3_5-1B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    (repository / "snapshots").mkdir()
    made.rename(repository / "snapshots" / "0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("OpenGVLab/InternVL3_5-1B", "InternVL3.5-1B"):
        model, _ = load(name)
        assert model.config.text_config.model_type == "qwen3"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("OpenGVLab/InternVL3-2B", r"hf download OpenGVLab/InternVL3-2B"),
        ("InternVL3.5-8B", r"hf download OpenGVLab/InternVL3_5-8B"),
        ("no such folder", "neither a folder nor a repository.*name the folder of a model"),
        ("/no/such/folder", "neither a folder nor a repository"),
    ],
)
def test_what_is_not_there_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        load(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ps_version": "v3"}, "ps_version"),
        ({"template": "Hermes-2"}, "Hermes-2"),
        ({"llm_config": 3}, "no 'llm_config'"),
        ({"select_layer": -4}, "vision_feature_layer"),
        ({"downsample_ratio": "half"}, "could not convert string to float: 'half'"),
    ],
)
def test_configuration_that_cannot_be_used_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = make.github_config("qwen3") | change
    source = tmp_path / "github"
    source.mkdir()
    made = make.write_github(tmp_path / "made", "qwen3")
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(CascadeVLError, match=message):
        load(made)


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    source = make.write_github(tmp_path / "github", "qwen3")
    file = source / "tokenizer.json"
    file.write_text(file.read_text().replace("<IMG_CONTEXT>", "<OTHER_TOKEN>"))
    with pytest.raises(CheckpointError, match="no token <IMG_CONTEXT>"):
        load(source)


def test_qwen_tokenizer_of_a_github_repository_is_read_from_vocabulary_and_merges(
    tmp_path: Path,
) -> None:
    source = make.write_github(tmp_path / "github", "qwen3")
    file = source / "tokenizer.json"
    parts = json.loads(file.read_text())
    # Released vocabularies hold the words first and the added tokens after them.
    added = [token["content"] for token in parts["added_tokens"]]
    words = [word for word in parts["model"]["vocab"] if word not in added]
    (source / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in parts["model"]["merges"])]
    (source / "merges.txt").write_text("\n".join(merges) + "\n")
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_theirs.Tokenizer", None]},
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "added_tokens_decoder": {
            str(len(words) + number): {key: token[key] for key in token if key != "id"}
            for number, token in enumerate(parts["added_tokens"])
        },
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "tokenization_theirs.py").write_text("raise SystemExit('remote code was run')")
    file.unlink()
    model, processor = load(source)
    text = "What is <img><IMG_CONTEXT></img> written?<|im_end|>"
    assert processor.tokenizer.tokenize(text) == make.tokenizer().tokenize(text)
    assert model.config.image_token_id == len(words) + added.index("<IMG_CONTEXT>")
    config["added_tokens_decoder"]["999"] = {"content": "<elsewhere>", "special": True}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'<elsewhere>' should have id 999"):
        load(source)
