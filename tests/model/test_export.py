from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model import make_checkpoints as make
from torch import Tensor
from transformers import AutoTokenizer, InternVLForConditionalGeneration

from cascadevl.errors import CheckpointError
from cascadevl.model.conversion import convert
from cascadevl.model.loading import load, save

BODIES = ("qwen2", "qwen3", "qwen3_moe", "gpt_oss", "internlm2", "internlm3")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    image = make.tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>")
    ids = [100, 101, *[image] * (2 * make.TOKENS_PER_TILE), 107, 109, 120]
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, make.TILE_PX, make.TILE_PX, generator=generator)
    result: Tensor = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits
    return result


def plain(path: Path) -> InternVLForConditionalGeneration:
    model, info = InternVLForConditionalGeneration.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("family", BODIES)
def test_converted_checkpoint_answers_in_plain_transformers(tmp_path: Path, family: str) -> None:
    source = make.write_github(tmp_path / "github", family, "6B", tied=family == "qwen2")
    layout = "hf_old" if family == "internlm3" else "hf"
    convert(source, tmp_path / "hf", layout=layout, max_shard_bytes=50_000)
    reference = make.reference_model(family, "6B", tied=family == "qwen2")
    torch.testing.assert_close(logits(plain(tmp_path / "hf")), logits(reference), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", BODIES)
def test_saved_model_answers_in_plain_transformers_and_in_ours(tmp_path: Path, family: str) -> None:
    tied = family in ("qwen3", "internlm2")
    model, processor = load(make.write_github(tmp_path / "github", family, tied=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)  # trained a little
    save(model, processor, tmp_path / "saved", max_shard_bytes=50_000)
    expected = logits(model)
    # Two implementations of one model: rounding apart, which is about 1e-7 of the values' size.
    difference = (logits(plain(tmp_path / "saved")) - expected).abs().max()
    assert difference < 1e-6 * max(1.0, float(expected.abs().max()))
    again, _ = load(tmp_path / "saved")
    assert torch.equal(logits(again), expected)
    assert again.config.tie_word_embeddings is tied


@pytest.mark.parametrize("layout", ["hf", "hf_old", "github"])
def test_every_layout_saved_loads_again_to_the_same_weights(tmp_path: Path, layout: Any) -> None:
    model, processor = load(make.write_github(tmp_path / "source", "qwen3_moe", "6B"))
    save(model, processor, tmp_path / "saved", layout=layout)
    again, _ = load(tmp_path / "saved")
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_internlm2_saved_for_github_gets_its_own_names_again(tmp_path: Path) -> None:
    source = make.write_github(tmp_path / "source", "internlm2")
    model, processor = load(source)
    save(model, processor, tmp_path / "saved", layout="github")
    convert(tmp_path / "saved", tmp_path / "hf", layout="hf")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["llm_config"]["architectures"] == ["InternLM2ForCausalLM"]
    torch.testing.assert_close(logits(plain(tmp_path / "hf")), logits(model), atol=1e-5, rtol=1e-5)


def test_our_own_settings_come_back(tmp_path: Path) -> None:
    model, processor = load(make.write_github(tmp_path / "source", "qwen3"))
    model.config.increment = 0.25
    model.config.trained_context = 4096
    model.config.ceil_after_image = True
    save(model, processor, tmp_path / "saved")
    again, _ = load(tmp_path / "saved")
    config = again.config
    assert (config.increment, config.trained_context, config.ceil_after_image) == (0.25, 4096, True)


@pytest.mark.parametrize(
    ("key", "value", "reason"), [("increment", 0.25, "step by 0.25"), ("ps_version", "v1", "v1")]
)
def test_where_plain_transformers_would_be_wrong_the_checkpoint_says_so(
    tmp_path: Path, key: str, value: Any, reason: str
) -> None:
    model, processor = load(make.write_github(tmp_path / "source", "qwen3"))
    setattr(model.config, key, value)
    save(model, processor, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert reason in config["cascadevl_requires"]
    assert config["architectures"] == ["CascadeVLForConditionalGeneration"]
    again, processor = load(tmp_path / "saved")
    setattr(again.config, key, {"increment": 1.0, "ps_version": "v2"}[key])
    save(again, processor, tmp_path / "usual")
    config = json.loads((tmp_path / "usual" / "config.json").read_text())
    assert "cascadevl_requires" not in config
    assert config["architectures"] == ["InternVLForConditionalGeneration"]


def test_saved_configuration_is_read_by_old_and_new_transformers(tmp_path: Path) -> None:
    model, processor = load(make.write_github(tmp_path / "source", "qwen2"))
    save(model, processor, tmp_path / "saved")
    text = json.loads((tmp_path / "saved" / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 1000000.0
    assert text["rope_scaling"]["factor"] == text["rope_parameters"]["factor"] == 2.0


def test_tokenizer_of_a_saved_model_opens_in_plain_transformers(tmp_path: Path) -> None:
    model, processor = load(make.write_github(tmp_path / "source", "qwen3"))
    save(model, processor, tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "What is <img><IMG_CONTEXT></img> on the door?<|im_end|>"
    assert tokenizer(text).input_ids == processor.tokenizer(text).input_ids
    assert tokenizer.context_image_token_id == model.config.image_token_id


def test_saving_never_overwrites(tmp_path: Path) -> None:
    source = make.write_github(tmp_path / "source", "qwen3")
    model, processor = load(source)
    with pytest.raises(CheckpointError, match="not empty"):
        save(model, processor, source)
