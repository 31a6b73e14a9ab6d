"""A small lab adapts a model: train with --lora, stop, resume, ask, merge, open elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from transformers import InternVLForConditionalGeneration

import cascadevl
from cascadevl.cli.main import main
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import TilingConfig
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.model.adapters import adapters_off
from cascadevl.model.loading import save
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.presets import initialise, nano_config

QUESTION, ANSWER = "What color is it?", "red"
FEW = {"num_hidden_layers": 1}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and a data set of one picture."""
    folder = tmp_path_factory.mktemp("lab")
    PIL.Image.new("RGB", (112, 112), "red").save(folder / "red.png")
    turns = [
        {"from": "human", "value": f"<image>\n{QUESTION}"},
        {"from": "gpt", "value": ANSWER},
    ]
    record = json.dumps({"image": "red.png", "conversations": turns})
    (folder / "red.jsonl").write_text(record + "\n")
    entry = {"root": ".", "annotation": "red.jsonl", "length": 1, "repeat_time": 8}
    (folder / "meta.json").write_text(json.dumps({"red": entry}))

    tokenizer = build_tokenizer([QUESTION, ANSWER] * 4, 350)
    token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    config = nano_config(len(tokenizer), image_token_id=token, vision_config=FEW, text_config=FEW)
    model = CascadeVLForConditionalGeneration(config)
    initialise(model, seed=0)
    processor = CascadeVLProcessor(
        tokenizer,
        system_message="",
        tiling=TilingConfig(tile_px=112, max_tiles=1),
        tokens_per_tile=config.tokens_per_tile,
    )
    save(model, processor, folder / "base")
    return folder


def words(lab: Path, out: str, *more: str) -> list[str]:
    start = ["train", "sft", "--model", str(lab / "base"), "--data", str(lab / "meta.json")]
    keys = {
        "model.precision": "float32",
        "data.max_tokens": 128,
        "data.prefetch": 0,
        "batch.row_tokens": 128,
        "batch.row_tiles": 4,
        "batch.buffer_rows": 1,
        "optim.lr": 1e-2,
        "run.num_steps": 6,
        "run.checkpoint_interval": 3,
        "run.log_interval": 1,
    }
    overrides = [f"--{key}={value}" for key, value in keys.items()]
    return [*start, "--out", str(lab / out), *overrides, *more]


def inputs_of(lab: Path, processor: CascadeVLProcessor) -> Any:
    picture = {"type": "image", "path": str(lab / "red.png")}
    return processor.apply_chat_template(
        [{"role": "user", "content": [picture, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def test_from_training_to_a_merged_model(lab: Path, capsys: pytest.CaptureFixture[str]):
    assert main(words(lab, "run", "--lora", "--lora.rank", "8")) == 0
    streams = capsys.readouterr()
    run = lab / "run"
    assert f"the model is in {run / 'model'}" in streams.out
    assert f"the adapter alone is in {run / 'adapter'}" in streams.out
    assert "parameters are trained (" in streams.err
    assert "rank: 8" in (run / "config.yaml").read_text()
    described = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["lora_dropout"]) == (8, 16, 0.05)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0] - 0.1

    base, processor = cascadevl.load(lab / "base")
    beside, _ = cascadevl.load(run / "adapter")
    merged, _ = cascadevl.load(run / "model")
    plain = InternVLForConditionalGeneration.from_pretrained(run / "model")
    inputs = inputs_of(lab, processor)
    with torch.no_grad():
        expected = beside(**inputs).logits
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(plain(**inputs).logits, expected, rtol=0, atol=1e-4)
        assert not torch.allclose(base(**inputs).logits, expected, atol=1e-2)
        with adapters_off(beside):
            assert torch.equal(base(**inputs).logits, beside(**inputs).logits)

    # The adapter alone is of use to every command; where it is not, the way is shown.
    ask = ["--image", str(lab / "red.png"), "--question", QUESTION, "--max-new-tokens", "3"]
    said = []
    for folder in (run / "adapter", run / "model"):
        assert main(["chat", str(folder), *ask]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert main(["convert", str(run / "adapter"), str(lab / "github"), "--to", "github"]) == 2
    assert f"cascadevl merge {run / 'adapter'} --out DIR" in capsys.readouterr().err

    check = ["data", "check", str(lab / "meta.json"), "--model", str(run / "adapter")]
    assert main(check) == 2
    assert f"of its base, {lab / 'base'}" in capsys.readouterr().err

    # Merged later, even after the base has moved.
    shutil.copytree(lab / "base", lab / "elsewhere")
    merge = ["merge", str(run / "adapter"), "--base", str(lab / "elsewhere")]
    assert main([*merge, "--out", str(lab / "merged")]) == 0
    assert f"wrote the merged model to {lab / 'merged'}" in capsys.readouterr().out
    weights = "model.safetensors"
    assert (lab / "merged" / weights).read_bytes() == (run / "model" / weights).read_bytes()
    assert main(["merge", str(lab / "base"), "--out", str(lab / "no")]) == 2
    assert "not the folder of an adapter" in capsys.readouterr().err


def test_mistakes_end_with_a_word_that_helps(lab: Path, capsys: pytest.CaptureFixture[str]):
    mistakes = [
        (["--lora", "--lora.rnk=8"], "did you mean 'rank'?"),
        (["--lora.targets=[q_proy]"], "did you mean 'q_proj'?"),
        (["--lora", "--model.frozen=[language]"], "model.frozen (language)"),
        (["--lora=maybe"], "key 'lora' is 'maybe'"),
    ]
    for more, expected in mistakes:
        assert main(words(lab, "never", *more)) == 2, more
        assert expected in capsys.readouterr().err, more
    assert not (lab / "never" / "model").exists()
