from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import cascadevl
from cascadevl.cli.main import main, make_parser
from cascadevl.cli.train import marked_text, read_config, split_words
from cascadevl.config import load_config
from cascadevl.data.spans import Span
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.errors import ConfigError
from cascadevl.train.config import TrainConfig
from cascadevl.train.lora import LoraConfig
from cascadevl.train.mpo import MPOConfig
from cascadevl.workflows.dry_run import SeenImage, SeenSample

CONFIGS = Path(__file__).parents[2] / "configs"
QUESTION, ANSWER = "what colour is this picture?", "it is grey"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and a meta file with two good records and a broken one."""
    folder = tmp_path_factory.mktemp("material")
    tokenizer = build_tokenizer([QUESTION, ANSWER], 300)
    tokenizer.save_pretrained(folder / "tokenizer")
    grey = np.full((112, 224, 3), 128, dtype=np.uint8)
    PIL.Image.fromarray(grey).save(folder / "grey.png")
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]
    lines = [
        {"id": 0, "image": "grey.png", "conversations": turns},
        {"id": 1, "conversations": [{"from": "human", "value": QUESTION}, turns[1]]},
        {"id": 2, "image": "absent.png", "conversations": turns},
    ]
    (folder / "some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entry = {"root": str(folder), "annotation": str(folder / "some.jsonl"), "length": 3}
    (folder / "meta.json").write_text(json.dumps({"some": entry}))
    return folder


def words(material: Path, *more: str) -> list[str]:
    start = ["train", "pretrain", "--model.preset", "nano", "--model.precision", "float32"]
    paths = [f"--model.tokenizer={material / 'tokenizer'}", "--data", str(material / "meta.json")]
    return [*start, *paths, *more]


def test_own_options_and_overrides_are_told_apart():
    own, overrides = split_words(
        [
            "a.yaml",
            "--optim.lr",
            "5e-6",
            "--model",
            "m",
            "--run.compile",
            "--out=o",
            "--x=1",
            "b.yaml",
        ]
    )
    assert own == ["a.yaml", "--model", "m", "--out=o", "b.yaml"]
    assert overrides == ["--optim.lr", "5e-6", "--run.compile", "--x=1"]


def test_lora_is_a_flag_with_settings_of_its_own(tmp_path: Path):
    def lora(*words: str) -> LoraConfig | None:
        return read_config(make_parser().parse_args(["train", "sft", *words])).lora

    assert lora() is None
    assert lora("--lora", "--model", "m") == LoraConfig()
    assert lora("--lora", "--lora.rank", "8") == LoraConfig(rank=8)
    assert lora("--lora.parts=[vision, language]") == LoraConfig(parts=("vision", "language"))
    (tmp_path / "a.yaml").write_text("lora: {rank: 4}")
    assert lora("--lora", str(tmp_path / "a.yaml")) == LoraConfig(rank=4)
    assert lora(str(tmp_path / "a.yaml"), "--lora=null") is None


def test_mpo_has_defaults_and_keys_of_its_own():
    def read(*words: str) -> TrainConfig:
        return read_config(make_parser().parse_args(["train", "mpo", "--model", "m", *words]))

    config = read("--mpo.preference", "hinge", "--mpo.beta=0.2", "--optim.eps", "1e-6")
    assert isinstance(config, MPOConfig)
    assert (config.mpo.preference, config.mpo.beta) == ("hinge", 0.2)
    assert (config.mpo.preference_weight, config.mpo.generation_weight) == (0.8, 1.0)
    assert (config.optim.lr, config.optim.eps) == (2e-7, 1e-6)  # a changed section keeps the rest
    assert (config.batch.packing, config.data.jpeg, config.data.max_tokens) == (
        "count",
        False,
        16384,
    )
    assert read("--lora", "--mpo.reference", "adapters_off").lora == LoraConfig()
    with pytest.raises(ConfigError, match="add --lora"):
        read("--mpo.reference", "adapters_off")
    with pytest.raises(ConfigError, match="did you mean 'beta'"):
        read("--mpo.betta", "1")


def test_files_then_short_options_then_overrides(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("model: {preset: nano}\noptim: {lr: 1.0, eps: 1e-6}\nrun: {out: from_file}\n")
    short = [
        "--model",
        "m",
        "--data",
        "a.json",
        "--data",
        "b, c.json",
        "--resume",
        "--out",
        "runs/1",
    ]
    overrides = ["--optim.lr", "5e-6", "--run.seed=7"]
    args = make_parser().parse_args(["train", "sft", str(file), *short, *overrides])
    config = read_config(args)
    assert args.stage == "sft"
    assert (config.model.path, config.model.preset) == ("m", None)
    assert config.data.meta == (Path("a.json"), Path("b, c.json"))
    assert (config.optim.lr, config.optim.eps) == (5e-6, 1e-6)
    assert (config.run.out, config.run.resume, config.run.seed) == (Path("runs/1"), True, 7)


def test_the_printed_configuration_is_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", "sft", "--print_config", "--optim.betas", "[0.8, 0.9]"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    config = load_config(TrainConfig, files=[tmp_path / "printed.yaml"])
    assert config == load_config(TrainConfig, overrides=["optim.betas=[0.8, 0.9]"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--optim.lrr=3", "unknown key 'optim.lrr'; did you mean 'lr'?"),
        ("--lr=3", "unknown key 'lr'; did you mean 'optim.lr'?"),
        ("--optim.lr=fast", "key 'optim.lr' is 'fast' (str), but must be float"),
        ("absent.yaml", "absent.yaml"),
    ],
)
def test_mistakes_are_named(word: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "sft", word]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_model_or_data_says_so(
    material: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert main(["train", "sft", "--dry-run"]) == 2
    assert "model" in capsys.readouterr().err
    assert main(words(material, "--data.meta=[]", "--dry-run")) == 2
    assert "data.meta" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_asked_for(
    material: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    data = ["--data", str(material / "meta.json"), "--out", str(tmp_path / "out")]
    released = ["train", "sft", str(CONFIGS / "sft_8b.yaml"), *data]
    assert main(released) == 2
    download = "hf download OpenGVLab/InternVL3_5-8B-Pretrained"
    assert capsys.readouterr().err.endswith(f"name its folder, or download it first: {download}\n")
    assert main([*released, "--dry-run"]) == 2
    assert f"{download} --exclude '*.safetensors' (no weights" in capsys.readouterr().err
    assert main(["train", "sft", str(CONFIGS / "sft_20b-a4b.yaml"), *data, "--dry-run"]) == 2
    streams = capsys.readouterr()
    assert "'runs/posthoc_20b-a4b/joint/model' is neither a folder" in streams.err
    assert "download" not in streams.err
    for words in (["pretrain", "8b"], ["posthoc", "20b-a4b"]):
        file = CONFIGS / f"{'_'.join(words)}.yaml"
        assert main(["train", words[0], str(file), *data, "--dry-run"]) == 2
        assert "model.path is not set; give --model DIR" in capsys.readouterr().err
        assert main(["train", words[0], str(file), *data]) == 2
        assert "with --model DIR (model.path)" in capsys.readouterr().err


def test_a_dry_run_shows_samples_as_the_model_will_see_them(
    material: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "160")
    out = material / "never"
    assert main(words(material, "--dry-run", "--out", str(out), "--data.increment", "0.25")) == 0
    shown = capsys.readouterr().out
    assert shown.count("─ sample ") == 3
    assert "left out: " in shown
    assert "absent.png" in shown
    # 224 x 112 px: 2 tiles and a thumbnail of 16 tokens each, 0.25 apart
    assert "image 1: 3 tiles, 48 visual tokens, increment 0.25" in shown
    assert f"<img><IMG_CONTEXT> x 48</img>\n{QUESTION}<|im_end|>" in shown
    assert f"⟦{ANSWER}<|im_end|>⟧" in shown
    assert not out.exists()


def test_a_dry_run_that_finds_nothing_is_a_mistake(
    material: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(words(material, "--dry-run", "--data.max_tokens", "3")) == 2
    streams = capsys.readouterr()
    assert "none of the first 100 records" in streams.err
    assert "cascadevl data check" in streams.err


def test_branches_and_images_are_marked():
    spans = (
        Span("<img><IMG_CONTEXT></img>", False, 0, 3),
        Span("first?", False, 1, 1),
        Span("one", True, 1, 1),
        Span("second?", False, 2, 1),
    )
    image = SeenImage(
        num_tiles=2, num_tokens=32, increment=1.0, first_position=1.0, last_position=32.0
    )
    sample = SeenSample(
        source="a:1",
        dataset="a",
        spans=spans,
        images=(image,),
        num_tokens=37,
        num_trained=1,
        last_position=36.0,
    )
    assert marked_text(sample).plain == (
        "<img><IMG_CONTEXT> x 32</img>"
        "\n── branch 1 ──\nfirst?⟦one⟧"
        "\n── branch 2 ──\nsecond?"
    )  # fmt: skip


def test_training_leaves_a_model_that_every_command_takes(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    short = ["--run.num_steps", "2", "--batch.row_tokens", "128", "--batch.row_tiles", "6"]
    out = tmp_path / "run"
    more = [*short, "--data.max_tokens=128", "--data.prefetch=0", "--out", str(out)]
    assert main(words(material, *more)) == 0
    streams = capsys.readouterr()
    assert "2 steps, loss " in streams.out
    assert "x missing_image of some" in streams.err
    (model,) = {path.parent for path in out.rglob("config.json")}
    assert str(model) in streams.out

    # The same run again is refused; its model is of use to every other command.
    assert main(words(material, *more)) == 2
    assert "resume" in capsys.readouterr().err
    check = ["data", "check", str(material / "meta.json"), "--model", str(model)]
    assert main(check) == 1
    assert "tokens of a record" in capsys.readouterr().out
    start = ["train", "sft", "--model", str(model), "--data", str(material / "meta.json")]
    assert main([*start, "--dry-run"]) == 0
    assert f"⟦{ANSWER}<|im_end|>⟧" in capsys.readouterr().out
    ask = ["chat", str(model), "--image", str(material / "grey.png"), "--question", QUESTION]
    assert main([*ask, "--max-new-tokens", "3", "--temperature", "1.0"]) == 0
    assert "<|im_end|>" not in capsys.readouterr().out
    converted = tmp_path / "github"
    assert main(["convert", str(model), str(converted), "--to", "github"]) == 0
    assert f"wrote {converted} in the github layout" in capsys.readouterr().out
    assert (converted / "config.json").is_file()


@pytest.mark.slow
def test_torchrun_divides_a_model_among_processes(material: Path, tmp_path: Path):
    run = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "cascadevl",
    ]
    short = ["--run.num_steps", "2", "--batch.row_tokens", "128", "--batch.row_tiles", "6"]
    more = [
        *short,
        "--data.max_tokens=128",
        "--model.shard",
        "full",
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [sys.executable, *run, *words(material, *more)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 steps, loss") == 1  # one process speaks for all
    model, _ = cascadevl.load(tmp_path / "run" / "model")
    assert not any(parameter.is_meta for parameter in model.parameters())
