"""Files of a processor in both layouts, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from tests.data.conftest import GPT_OSS_TOKENS, TEXTS
from tests.data.some_messages import SMALL, TALK
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import TilingConfig
from cascadevl.errors import CheckpointError, ConfigError

FILES = {
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
}


@pytest.mark.parametrize("system", ["", None, "Be brief."])
def test_saved_and_loaded(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, system: str | None
) -> None:
    tiling = TilingConfig(tile_px=28, min_tiles=2, max_tiles=5, thumbnail=False)
    ours = CascadeVLProcessor(
        tokenizer, system_message=system, tiling=tiling, tokens_per_tile=4, share_tiles=False
    )
    written = ours.save_pretrained(tmp_path)
    assert {Path(file).name for file in written} == FILES == {f.name for f in tmp_path.iterdir()}
    loaded = CascadeVLProcessor.from_pretrained(tmp_path)
    assert loaded.settings == ours.settings
    assert loaded.chat_template == ours.chat_template
    assert loaded.prompt(TALK).input_ids.tolist() == ours.prompt(TALK).input_ids.tolist()
    assert len(loaded.tokenizer) == len(tokenizer)


def test_files_have_the_released_fields(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    processor = CascadeVLProcessor(tokenizer, system_message="", **SMALL)
    processor.save_pretrained(tmp_path)

    def read(name: str) -> dict[str, Any]:
        return dict(json.loads((tmp_path / name).read_text(encoding="utf-8")))

    images, video = read("preprocessor_config.json"), read("video_preprocessor_config.json")
    for fields in (images, video):
        assert fields["size"] == {"height": 28, "width": 28}
        assert fields["image_mean"] == [0.485, 0.456, 0.406]
        assert fields["image_std"] == [0.229, 0.224, 0.225]
        assert fields["resample"] == PIL.Image.Resampling.BICUBIC
        assert fields["rescale_factor"] == 1 / 255
    assert (images["crop_to_patches"], images["min_patches"], images["max_patches"]) == (True, 1, 6)
    assert images["image_processor_type"] == "GotOcr2ImageProcessor"
    assert video["video_processor_type"] == "InternVLVideoProcessor"
    assert read("processor_config.json")["image_seq_length"] == 4
    named = read("tokenizer_config.json")["extra_special_tokens"]
    assert named["context_image_token"] == "<IMG_CONTEXT>"


def released_tokenizer(folder: Path, *, gpt_oss: bool = False) -> None:
    """Tokenizer files as a GitHub repository has them: no named tokens, no ``<video>``."""
    from cascadevl.data import tokenizer as module

    made = module.build_tokenizer(TEXTS, 400)
    if gpt_oss:
        made.add_tokens(GPT_OSS_TOKENS, special_tokens=True)
    made.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for key in [*config]:
        if key.endswith("image_token") or key in ("video_token", "extra_special_tokens"):
            del config[key]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


GITHUB_CONFIG = {
    "model_type": "internvl_chat",
    "architectures": ["InternVLChatModel"],
    "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
    "template": "internvl2_5",
    "force_image_size": 448,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 12,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "downsample_ratio": 0.5,
    "vision_config": {"image_size": 448, "patch_size": 14},
}


def test_the_github_layout_is_read(tmp_path: Path) -> None:
    released_tokenizer(tmp_path)
    write(tmp_path, "config.json", GITHUB_CONFIG)
    ours = CascadeVLProcessor.from_pretrained(tmp_path)
    assert ours.tiling == TilingConfig()
    assert ours.tokens_per_tile == 256
    assert ours.system_message is None  # as official chat()
    smaller = {"max_dynamic_patch": 6, "use_thumbnail": False, "downsample_ratio": 0.25}
    write(tmp_path, "config.json", {**GITHUB_CONFIG, **smaller, "system_message": "Hi."})
    ours = CascadeVLProcessor.from_pretrained(tmp_path)
    assert ours.tiling == TilingConfig(max_tiles=6, thumbnail=False)
    assert (ours.tokens_per_tile, ours.system_message) == (64, "Hi.")


def test_slow_tokenizer_files_are_read(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Released InternVL3: vocabulary, merges and a config, but no tokenizer.json."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = {token: number for number, token in tokenizer.added_tokens_decoder.items()}
    decoder = {
        str(number): {"content": token.content, "special": token.special}
        for token, number in special.items()
    }
    write(tmp_path, "config.json", GITHUB_CONFIG)
    write(tmp_path, "vocab.json", model["vocab"])
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    write(
        tmp_path,
        "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "added_tokens_decoder": decoder,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
    )
    loaded = CascadeVLProcessor.from_pretrained(tmp_path)
    ours = CascadeVLProcessor(tokenizer)
    talk = [{"role": "user", "content": "Add 12, <ref>I'll</ref> e\u0301!\n\n"}]
    assert loaded.prompt(talk).input_ids.tolist() == ours.prompt(talk).input_ids.tolist()
    assert loaded.stop_token_ids() == ours.stop_token_ids()


def test_the_github_layout_becomes_the_hf_layout(tmp_path: Path) -> None:
    source, target = tmp_path / "github", tmp_path / "hf"
    source.mkdir()
    released_tokenizer(source)
    write(source, "config.json", GITHUB_CONFIG)
    ours = CascadeVLProcessor.from_pretrained(source)
    ours.save_pretrained(target)
    loaded = CascadeVLProcessor.from_pretrained(target)
    assert loaded.settings == ours.settings
    named = AutoTokenizer.from_pretrained(target)
    assert (named.start_image_token, named.end_image_token) == ("<img>", "</img>")
    assert named.video_token == "<video>"


@pytest.mark.parametrize("gpt_oss", [False, True])
def test_the_released_hf_layout_is_read(tmp_path: Path, gpt_oss: bool) -> None:
    released_tokenizer(tmp_path, gpt_oss=gpt_oss)
    pixels = {
        "crop_to_patches": False,  # released so; the processor tiles nevertheless
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "size": {"height": 448, "width": 448},
        "min_patches": 1,
        "max_patches": 12,
    }
    wrong = {"size": {"height": 384, "width": 384}, "image_mean": [0.48145466] * 3}
    vision = {"image_size": [448, 448], "patch_size": [14, 14]}
    write(tmp_path, "config.json", {"model_type": "internvl", "vision_config": vision})
    write(tmp_path, "preprocessor_config.json", pixels)
    write(tmp_path, "video_preprocessor_config.json", wrong)
    write(tmp_path, "processor_config.json", {"image_seq_length": 256})
    ours = CascadeVLProcessor.from_pretrained(tmp_path)
    assert ours.tiling == TilingConfig()
    assert ours.tokens_per_tile == 256
    assert ours.system_message == ""  # as the released chat template
    if not gpt_oss:
        assert ours.template.name == "internvl2_5"


def test_a_gpt_oss_tokenizer_tells_its_template(tmp_path: Path) -> None:
    """Without Qwen's turn tokens there is only one template left."""
    released_tokenizer(tmp_path, gpt_oss=True)
    tokenizer = (tmp_path / "tokenizer.json").read_text()
    for token in ("im_start", "im_end"):
        tokenizer = tokenizer.replace(f"<|{token}|>", f"<|reserved_{token}|>")
    (tmp_path / "tokenizer.json").write_text(tokenizer)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write(tmp_path, "tokenizer_config.json", {**config, "eos_token": "<|return|>"})
    write(tmp_path, "processor_config.json", {"image_seq_length": 256})
    assert CascadeVLProcessor.from_pretrained(tmp_path).template.name == "internvl3_5_gpt_oss"


@pytest.mark.parametrize(
    ("files", "error", "problem"),
    [
        ({}, CheckpointError, "neither config.json nor"),
        ({"config.json": [1]}, CheckpointError, "holds a list"),
        ({"config.json": {"template": "phi3-chat"}}, ConfigError, "phi3-chat"),
        (
            {"preprocessor_config.json": {"image_mean": [0.48, 0.45, 0.4]}},
            CheckpointError,
            "image_mean",
        ),
        (
            {
                "config.json": {"vision_config": {"image_size": 448}},
                "preprocessor_config.json": {"size": {"height": 384, "width": 384}},
            },
            CheckpointError,
            r"\[448, 384\] px",
        ),
        (
            {"processor_config.json": {"cascadevl": {"tiling": {"tile": 3}}}},
            CheckpointError,
            "cannot be used",
        ),
    ],
)
def test_files_that_cannot_be_used_are_named(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    files: dict[str, object],
    error: type[Exception],
    problem: str,
) -> None:
    for name, content in files.items():
        write(tmp_path, name, content)
    with pytest.raises(error, match=problem):
        CascadeVLProcessor.from_pretrained(tmp_path, tokenizer=tokenizer)


def test_a_broken_file_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": 1,}')
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON"):
        CascadeVLProcessor.from_pretrained(tmp_path, tokenizer=tokenizer)
