"""A person with data of their own: check, train, stop, resume, ask, convert, open elsewhere."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
import torch
from transformers import InternVLForConditionalGeneration

import cascadevl
from cascadevl.cli.main import main
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import TilingConfig
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.model.loading import save
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.presets import initialise, nano_config
from cascadevl.train.log import RunLog

QUESTION, ANSWER = "What color is it?", "red"
STEPS = 12

Json = dict[str, Any]


def talk(question: str, answer: str = ANSWER) -> Json:
    """The turns of one question."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns}


GOOD: list[Json] = [
    talk("Who are you?", "a model"),
    {"image": "red.png", **talk(f"<image>\n{QUESTION}")},
    {"image": ["red.png", "wide.png"], **talk("Image-1: <image>\nImage-2: <image>\nSame?", "no")},
    {"video": "grows.mp4", **talk(f"<video>\n{QUESTION}")},
    {
        "image": "red.png",
        **talk("Where is <ref>it</ref>?", "<ref>it</ref><box>[[0, 0, 999, 999]]</box>"),
    },
    {
        "image": "wide.png",
        "conversations": [{"from": "pretrain", "value": "A red one <image> stands here."}],
    },
]
BAD: dict[str, Json | str] = {
    "image_count": {"image": "red.png", **talk("<image><image>")},
    "missing_image": {"image": "absent.png", **talk("<image>")},
    "unsupported_image": {"image": "text.png", **talk("<image>")},
    "missing_video": {"video": "absent.mp4", **talk("<video>")},
    "bad_turns": {"conversations": [{"from": "human", "value": "hello?"}]},
    "invalid_json": '{"conversations": [],}',
    "control_token": talk("<|im_end|>"),
}


def write_media(folder: Path) -> None:
    PIL.Image.new("RGB", (112, 112), "red").save(folder / "red.png")
    PIL.Image.new("RGB", (224, 112), "red").save(folder / "wide.png")
    (folder / "text.png").write_text("no picture")
    with av.open(str(folder / "grows.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(16):
            pixels = np.zeros((64, 64, 3), dtype=np.uint8)
            pixels[:, : 4 * number] = 255, 0, 0
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, and a data set of every kind of record, good and bad."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "media").mkdir()
    write_media(folder / "media")
    lines = [line if isinstance(line, str) else json.dumps(line) for line in (*GOOD, *BAD.values())]
    (folder / "all.jsonl").write_text("\n".join(lines) + "\n")
    entry = {"root": "media", "annotation": "all.jsonl", "data_augment": True, "length": 13}
    (folder / "meta.json").write_text(json.dumps({"mine": entry}))

    texts = [turn["value"] for record in GOOD for turn in record["conversations"]]
    tokenizer = build_tokenizer(texts * 4, 400)
    config = nano_config(
        len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        vision_config={"num_hidden_layers": 1},
        text_config={"num_hidden_layers": 1},
    )
    model = CascadeVLForConditionalGeneration(config)
    initialise(model, seed=0)
    processor = CascadeVLProcessor(
        tokenizer,
        system_message="",
        tiling=TilingConfig(tile_px=112, max_tiles=4),
        tokens_per_tile=config.tokens_per_tile,
    )
    save(model, processor, folder / "start")
    return folder


def train_words(own: Path, out: str) -> list[str]:
    start = ["train", "sft", "--model", str(own / "start"), "--data", str(own / "meta.json")]
    keys = {
        "model.precision": "float32",
        "data.max_tokens": 512,
        "data.max_frames": 8,
        "data.max_skipped_share": 0.9,
        "data.prefetch": 0,
        "batch.row_tokens": 512,
        "batch.row_tiles": 12,
        "batch.buffer_rows": 2,
        "optim.lr": 3e-3,
        "run.num_steps": STEPS,
        "run.log_interval": 1,
    }
    overrides = [f"--{key}={value}" for key, value in keys.items()]
    return [*start, "--out", str(own / out), *overrides]


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def trained(own: Path) -> Path:
    """The model of an uninterrupted run; trained by whoever needs it first."""
    if not (own / "run" / "model").exists():
        assert main(train_words(own, "run")) == 0
    return own / "run" / "model"


def test_the_check_names_every_bad_record(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["data", "check", str(own / "meta.json"), "--model", str(own / "start"), "--deep"]
    assert main(words) == 1
    shown = capsys.readouterr().out
    for number, kind in enumerate(BAD, start=len(GOOD) + 1):
        assert f"mine: 1 x {kind}" in shown
        assert f"all.jsonl:{number}: " in shown
    assert "7 of 13 records are broken" in shown
    assert "tokens of a record" in shown
    assert "not looked at" not in shown


def test_training_learns_stops_on_ctrl_c_and_resumes_exactly(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    whole = losses(trained(own).parent)
    assert len(whole) == STEPS
    assert sum(whole[-3:]) < 0.7 * sum(whole[:3])
    assert "x missing_image of mine" in capsys.readouterr().err

    advance = RunLog.advance

    def interrupted(log: RunLog, step: int) -> None:
        advance(log, step)
        if step == 5:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "advance", interrupted)
        assert main(train_words(own, "stopped")) == 1
    assert "stopped after step 5 of 12" in capsys.readouterr().err
    assert not (own / "stopped" / "model").exists()

    assert main([*train_words(own, "stopped"), "--resume"]) == 0
    assert losses(own / "stopped") == whole
    again = (own / "stopped" / "model" / "model.safetensors").read_bytes()
    assert again == (trained(own) / "model.safetensors").read_bytes()


def test_the_model_answers_in_every_layout(own: Path, capsys: pytest.CaptureFixture[str]):
    model = trained(own)
    for layout, source in (("github", "run/model"), ("hf", "github"), ("hf-old", "github")):
        shutil.rmtree(own / layout, ignore_errors=True)
        assert main(["convert", str(own / source), str(own / layout), "--to", layout]) == 0
    weights = "model.safetensors"
    assert (own / "hf" / weights).read_bytes() == (model / weights).read_bytes()

    capsys.readouterr()
    said = set()
    for folder in (model, own / "github", own / "hf", own / "hf-old"):
        ask = ["--image", str(own / "media" / "wide.png"), "--question", QUESTION]
        assert main(["chat", str(folder), *ask, "--max-new-tokens", "4"]) == 0
        said.add(capsys.readouterr().out)
    assert len(said) == 1


def test_the_model_opens_in_python_and_in_plain_transformers(own: Path):
    model, processor = cascadevl.load(trained(own))
    picture = {"type": "image", "path": str(own / "media" / "wide.png")}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [picture, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    plain = InternVLForConditionalGeneration.from_pretrained(trained(own))
    with torch.no_grad():
        ours, theirs = model(**inputs).logits, plain(**inputs).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    answers = [each.generate(**inputs, max_new_tokens=4) for each in (model, plain)]
    assert answers[0].tolist() == answers[1].tolist()


def test_mistakes_end_with_a_word_that_helps(own: Path, capsys: pytest.CaptureFixture[str]):
    meta, start = str(own / "meta.json"), str(own / "start")
    mistakes = [
        (["train", "sft", "--model", start, "--data", meta, "--optim.lrr=1"], "'lr'"),
        (["train", "sft", "--model", str(own / "media"), "--data", meta], "config.json is missing"),
        (["train", "sft", "--model", start, "--data", str(own / "no.json")], "no.json"),
        (["train", "sft", "--model", start, "--data", str(own / "all.jsonl")], "not a meta file"),
        (["data", "check", str(own / "all.jsonl")], "not a meta file"),
        (["chat", start, "--image", str(own / "media" / "text.png"), "--question", "?"], "picture"),
        (["chat", start, "--question", " "], "empty"),
        (["convert", start, start, "--to", "github"], "not empty"),
    ]
    for words, expected in mistakes:
        assert main(words) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert expected in error, words
