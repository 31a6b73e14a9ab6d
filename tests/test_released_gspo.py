"""The configurations of GSPO say what the released scripts and the GSPO paper say.

The tables here were typed from the published values, not copied from the files under test.
"""

from __future__ import annotations

import re
from operator import attrgetter
from pathlib import Path

import pytest

from cascadevl.cli.main import make_parser
from cascadevl.cli.train import read_config
from cascadevl.config import load_config
from cascadevl.model.zoo import ZOO
from cascadevl.train.gspo_config import GSPOConfig

CONFIGS = Path(__file__).parents[1] / "configs"
TRIALS = ("nano", "micro")
SOURCE = re.compile(r"# (not published|scripts?|(the )?report|GSPO paper|ours)\b")

RELEASED = [m for m in ZOO.values() if m.name.startswith("InternVL3.5") and m.preset]
"""Sizes with runs of their own: Flash is made of them."""

SCRIPT = {
    "model.precision": "bfloat16",
    "model.gradient_checkpointing": True,
    "model.frozen": (),
    "optim.betas": (0.9, 0.999),
    "optim.schedule": "constant",
    "optim.warmup_ratio": 0.0,
    "rollout.prompts": 512,
    "rollout.group": 16,
    "rollout.temperature": 1.0,
    "rollout.max_prompt_tokens": 8192,
    "rollout.max_answer_tokens": 32768,
    "policy.level": "sequence",
    "policy.clip_low": 0.2,
    "policy.clip_high": 0.2,
    "policy.unbiased": True,
    "policy.eps": 1e-6,
}
# size: start, lr, questions of a mini-batch, clip of the gradient, epochs of 70,000 questions
SIZES = {
    "1b": ("OpenGVLab/InternVL3_5-1B-MPO", 1e-6, 32, 1.0, 1),
    "2b": ("OpenGVLab/InternVL3_5-2B-MPO", 1e-6, 32, 1.0, 1),
    "4b": ("OpenGVLab/InternVL3_5-4B-MPO", 1e-6, 32, 1.0, 1),
    "8b": ("OpenGVLab/InternVL3_5-8B-MPO", 1e-6, 32, 1.0, 1),
    "14b": ("OpenGVLab/InternVL3_5-14B-MPO", 1e-6, 32, 1.0, 1),
    "38b": ("OpenGVLab/InternVL3_5-38B-MPO", 1e-6, 32, 1.0, 1),
    "20b-a4b": ("runs/mpo_20b-a4b/model", 1e-6, 32, 1.0, 1),
    "30b-a3b": ("OpenGVLab/InternVL3_5-30B-A3B-MPO", 1e-6, 32, 1.0, 1),
    "241b-a28b": ("OpenGVLab/InternVL3_5-241B-A28B-MPO", 8e-7, 64, 0.5, 2),
}


def opened(*files: str) -> GSPOConfig:
    """Configurations as ``cascadevl train`` reads them."""
    words = ["train", "gspo", *(str(CONFIGS / file) for file in files)]
    config = read_config(make_parser().parse_args(words))
    assert isinstance(config, GSPOConfig)
    return config


def differing(config: GSPOConfig, expected: dict[str, object]) -> dict[str, object]:
    found = {key: attrgetter(key)(config) for key in expected}
    return {key: value for key, value in found.items() if value != expected[key]}


@pytest.mark.parametrize("size", SIZES)
def test_gspo_of_internvl3_5(size: str):
    start, lr, mini_batch, max_grad_norm, epochs = SIZES[size]
    own = {"model.path": start, "optim.lr": lr, "optim.max_grad_norm": max_grad_norm}
    config = opened(f"gspo_{size}.yaml")
    assert differing(config, SCRIPT | own) == {}
    assert config.rollout.prompts // config.policy.updates == mini_batch
    batches = config.run.num_steps / config.policy.updates
    assert batches == pytest.approx(epochs * 70_000 / 512, abs=1)
    assert config.run.out == Path("runs") / f"gspo_{size}"


def test_the_loss_of_the_paper_is_a_preset_over_any_size():
    config = opened("gspo_8b.yaml", "bases/gspo_paper.yaml")
    paper = {
        "policy.updates": 4,
        "policy.clip_low": 3e-4,
        "policy.clip_high": 4e-4,
        "policy.unbiased": False,
    }
    assert differing(config, SCRIPT | paper | {"optim.lr": 1e-6}) == {}
    assert load_config(GSPOConfig, files=[CONFIGS / "bases/gspo_paper.yaml"]) == GSPOConfig()


def test_every_size_of_internvl3_5_has_its_file_and_no_other_is_there():
    released = {model.preset for model in RELEASED}
    assert set(SIZES) == released
    files = {file.stem.removeprefix("gspo_") for file in CONFIGS.glob("gspo_*.yaml")}
    assert files - set(TRIALS) == released


@pytest.mark.parametrize("model", RELEASED)
def test_starts_on_the_hub_are_repositories_of_the_size(model):
    path = opened(f"gspo_{model.preset}.yaml").model.path
    if "-MPO" in model.suffixes:
        assert path == f"{model.hub_id}-MPO"
    else:
        assert path == f"runs/mpo_{model.preset}/model"


def test_every_value_has_its_source_beside_it():
    files = [*CONFIGS.glob("gspo_*.yaml"), *(CONFIGS / "bases").glob("gspo_*.yaml")]
    assert len(files) >= 12
    for file in files:
        if file.stem.removeprefix("gspo_") in TRIALS:
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition("#")[0].partition(":")
            if not value.strip() or key.strip() in ("base", "out"):
                continue
            assert SOURCE.search(line), f"{file.name}: {line}"
