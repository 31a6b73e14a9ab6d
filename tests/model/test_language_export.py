from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.model import make_checkpoints as make
from tests.model import make_flash
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cascadevl.cli.main import main
from cascadevl.errors import CheckpointError
from cascadevl.model.language_export import export_language

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "internlm2": "LlamaForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
    "llama": "LlamaForCausalLM",
}


def stored(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def language_by_hand(github: dict[str, Tensor]) -> dict[str, Tensor]:
    """The language half of a checkpoint under the names that a text-only model has."""
    return {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in make.hf_tensors(github).items()
        if "vision_tower" not in name and "multi_modal_projector" not in name
    }


def read_json(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text())
    return values


def plain(path: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.tensor([[100, 101, 5, 17, 300, 107, 109, 120, 31, 44, 45, 46]])
    result: Tensor = model(input_ids=ids).logits
    return result


@pytest.mark.parametrize("family", make.FAMILIES)
def test_plain_transformers_opens_it_and_computes_the_same(tmp_path: Path, family: str) -> None:
    tied = family in ("qwen2", "internlm2")
    source = make.write_github(tmp_path / "github", family, tied=tied, num_files=2)
    export_language(source, tmp_path / "text", max_shard_bytes=20_000)
    model = plain(tmp_path / "text")
    assert model.config.architectures == [ARCHITECTURES[family]]
    is_tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert is_tied == tied
    whole = make.reference_model(family, tied=tied)
    torch.testing.assert_close(logits(model), logits(whole), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", make.FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_of_the_language_half_and_no_other_is_there(
    tmp_path: Path, family: str, tied: bool
) -> None:
    tensors = make.github_tensors(family, tied=tied)
    source = make.write(tmp_path / "github", tensors, make.github_config(family))
    export_language(source, tmp_path / "text", max_shard_bytes=30_000)
    found, expected = stored(tmp_path / "text"), language_by_hand(tensors)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read_json(tmp_path / "text" / "config.json")["tie_word_embeddings"] is tied
    assert len(list((tmp_path / "text").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("layout", ["hf", "hf_old"])
def test_from_the_hf_layouts_too(tmp_path: Path, layout: str) -> None:
    github = make.github_tensors("internlm2")
    hf = make.hf_tensors(github)
    tensors = hf if layout == "hf" else make.old_hf_tensors(hf)
    source = make.write(tmp_path / "hf", tensors, make.hf_config("internlm2"))
    export_language(source, tmp_path / "text")
    found, expected = stored(tmp_path / "text"), language_by_hand(github)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_type_is_that_of_the_files_not_that_of_the_configuration(tmp_path: Path) -> None:
    tensors = {
        name: tensor.bfloat16() if "language" in name else tensor
        for name, tensor in make.github_tensors("qwen3").items()
    }
    source = make.write(tmp_path / "github", tensors, make.github_config("qwen3"))
    export_language(source, tmp_path / "text")
    config = read_json(tmp_path / "text" / "config.json")
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config
    assert plain(tmp_path / "text").dtype == torch.bfloat16


@pytest.mark.parametrize("is_on", [True, False])
def test_a_flash_router_stays_behind_because_it_belongs_to_the_other_half(
    tmp_path: Path, is_on: bool
) -> None:
    export_language(make_flash.write_flash(tmp_path / "flash", flash_mode=is_on), tmp_path / "text")
    export_language(make.write_github(tmp_path / "plain", "qwen3"), tmp_path / "plain text")
    assert stored(tmp_path / "text").keys() == stored(tmp_path / "plain text").keys()


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_tokenizer_prompt_and_ends_go_along(tmp_path: Path, family: str) -> None:
    source = make.write_github(tmp_path / "github", family)
    export_language(source, tmp_path / "text")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text", local_files_only=True)
    text = "What is written on the <img><IMG_CONTEXT></img> door?"
    assert tokenizer(text).input_ids == make.tokenizer(family)(text).input_ids
    end = "<|return|>" if family == "gpt_oss" else "<|im_end|>"
    ends = read_json(tmp_path / "text" / "generation_config.json")["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids(end) in ends
    question = [{"role": "user", "content": "What is it?"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert "What is it?" in prompt
    assert prompt.endswith("assistant" if family == "gpt_oss" else "assistant\n")
    assert not (tmp_path / "text" / "preprocessor_config.json").exists()


def test_what_conversion_refuses_is_refused_here_too(tmp_path: Path) -> None:
    tensors = make.github_tensors("qwen3")
    del tensors["mlp1.1.bias"]
    source = make.write(tmp_path / "github", tensors, make.github_config("qwen3"))
    with pytest.raises(CheckpointError, match="1 missing"):
        export_language(source, tmp_path / "text")
    assert [file.name for file in tmp_path.iterdir()] == ["github"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make.write_github(tmp_path / "github", "qwen3")
    assert main(["convert", str(source), str(tmp_path / "text"), "--language-only"]) == 0
    assert "language half" in capsys.readouterr().out
    assert plain(tmp_path / "text").config.model_type == "qwen3"


def test_the_command_wants_one_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(tmp_path), str(tmp_path / "out")]
    for more in ([], ["--to", "hf", "--language-only"]):
        with pytest.raises(SystemExit):
            main([*words, *more])
        assert "--language-only" in capsys.readouterr().err
