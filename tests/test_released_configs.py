"""The configurations of released sizes say what the reports and the released scripts say.

The tables here were typed from the published values, not copied from the files under test.
"""

from __future__ import annotations

import re
from operator import attrgetter
from pathlib import Path

import pytest

from cascadevl.cli.main import make_parser
from cascadevl.cli.train import read_config
from cascadevl.model.zoo import ZOO
from cascadevl.train.config import TrainConfig
from cascadevl.train.posthoc import PosthocConfig, WarmupConfig

CONFIGS = Path(__file__).parents[1] / "configs"
TRIALS = ("nano", "micro")
"""Presets that are ours: nobody published values for them."""

SOURCE = re.compile(
    r"# (not published|scripts?|stages? [0-3]|((the )?report|(GSPO )?paper)|released code|ours)\b"
)
"""How the comment that says where a value is from begins."""

# Released scripts, all stages: AdamW(.9, .999), eps 1e-8, decay .05, warm-up .03, cosine, clip 1.
EVERY_STAGE = {
    "model.precision": "bfloat16",
    "model.gradient_checkpointing": True,
    "data.max_tiles": 12,
    "data.min_frames": 8,
    "data.max_frames": 32,
    "batch.rows": 1,
    "optim.name": "adamw",
    "optim.betas": (0.9, 0.999),
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.05,
    "optim.schedule": "cosine",
    "optim.warmup_ratio": 0.03,
    "optim.min_lr_ratio": 0.0,
    "optim.max_grad_norm": 1.0,
    "optim.vision_lr_scale": 1.0,
    "optim.projector_lr_scale": 1.0,
    "optim.language_lr_scale": 1.0,
    "run.accumulation": None,
}
PACKED = {
    "model.frozen": (),
    "data.max_tokens": 32768,
    "data.jpeg": True,
    "batch.packing": "fill",
    "batch.row_tokens": 32768,
    "batch.row_tiles": 96,
    "batch.buffer_rows": 20,
    "batch.averaging": "square",
    "run.global_batch": 512,
}

# shell/internvl3_5_qwen3, and the GPT-OSS scripts' stage 2.
SFT_3_5 = {"data.mixture": "as_given", "data.increment": 1.0, "run.num_steps": 8000, "run.seed": 42}
# size: start, lr, drop path
SFT_3_5_SIZES = {
    "1b": ("OpenGVLab/InternVL3_5-1B-Pretrained", 8e-5, 0.0),
    "2b": ("OpenGVLab/InternVL3_5-2B-Pretrained", 8e-5, 0.0),
    "4b": ("OpenGVLab/InternVL3_5-4B-Pretrained", 8e-5, 0.0),
    "8b": ("OpenGVLab/InternVL3_5-8B-Pretrained", 8e-5, 0.1),
    "14b": ("OpenGVLab/InternVL3_5-14B-Pretrained", 8e-5, 0.1),
    "38b": ("OpenGVLab/InternVL3_5-38B-Pretrained", 8e-5, 0.4),
    "20b-a4b": ("runs/posthoc_20b-a4b/joint/model", 8e-5, 0.1),
    "30b-a3b": ("OpenGVLab/InternVL3_5-30B-A3B-Pretrained", 8e-5, 0.1),
    "241b-a28b": ("OpenGVLab/InternVL3_5-241B-A28B-Pretrained", 2e-5, 0.4),
}

# The GPT-OSS scripts' stage 1; 116M samples, 250B tokens, 1:2.5.
PRETRAIN_3_5 = {
    "data.mixture": "internvl3_5",
    "data.increment": 1.0,
    "optim.lr": 2e-5,
    "run.num_steps": 15000,
}
# size: start, drop path
PRETRAIN_3_5_SIZES = {
    "1b": (None, 0.0),
    "2b": (None, 0.0),
    "4b": (None, 0.0),
    "8b": (None, 0.1),
    "14b": (None, 0.1),
    "38b": (None, 0.4),
    "20b-a4b": ("runs/posthoc_20b-a4b/warmup/model", 0.1),
    "30b-a3b": (None, 0.1),
    "241b-a28b": (None, 0.4),
}

# shell/internvl3.0/2nd_finetune
SFT_3 = {
    "model.frozen": ("vision",),
    "data.mixture": "as_given",
    "data.max_tokens": 16384,
    "data.jpeg": False,
    "data.increment": 1.0,
    "batch.packing": "count",
    "batch.row_samples": 1,
    "batch.averaging": "token",
    "run.global_batch": 128,
    "run.seed": 42,
}
# size: start, lr, drop path
SFT_3_SIZES = {
    "internvl3-1b": ("OpenGVLab/InternVL3-1B", 1e-5, 0.0),
    "internvl3-2b": ("OpenGVLab/InternVL3-2B", 2e-5, 0.0),
    "internvl3-8b": ("OpenGVLab/InternVL3-8B", 2e-5, 0.0),
    "internvl3-9b": ("OpenGVLab/InternVL3-9B", 2e-5, 0.0),
    "internvl3-14b": ("OpenGVLab/InternVL3-14B", 2e-5, 0.1),
    "internvl3-38b": ("OpenGVLab/InternVL3-38B", 2e-5, 0.2),
    "internvl3-78b": ("OpenGVLab/InternVL3-78B", 2e-5, 0.4),
}

# InternVL3 report, sections 2.1, 2.2 and 2.5; the rest as in the GPT-OSS scripts' stage 1.
PRETRAIN_3 = {"data.mixture": "internvl3", "data.increment": "random", "optim.lr": 2e-5}
# size: start, drop path (of its MPO script)
PRETRAIN_3_SIZES = {
    "internvl3-1b": (None, 0.1),
    "internvl3-2b": (None, 0.1),
    "internvl3-8b": (None, 0.1),
    "internvl3-9b": (None, 0.1),
    "internvl3-14b": (None, 0.1),
    "internvl3-38b": (None, 0.4),
    "internvl3-78b": (None, 0.4),
}


# shell/internvl3.0/mpo, shell/internvl3_5_qwen3 and stage 3 of the GPT-OSS scripts.
MPO = {
    "model.frozen": (),
    "model.drop_path": None,  # ours: nothing is dropped while log-probabilities are taken
    "data.mixture": "as_given",
    "data.jpeg": False,
    "data.increment": 1.0,
    "batch.packing": "count",
    "batch.row_samples": 1,
    "optim.lr": 2e-7,
    "mpo.preference_weight": 0.8,
    "mpo.quality_weight": 0.2,
    "mpo.generation_weight": 1.0,
    "mpo.beta": 0.1,
    "mpo.preference": "sigmoid",
    "mpo.update_before_use": False,
    "mpo.reference": "stored",
    "run.seed": 42,
}
# size: start, longest sequence, batch, pairs of an epoch
MPO_SIZES = {
    "1b": ("OpenGVLab/InternVL3_5-1B-Instruct", 16384, 256, 200_000),
    "2b": ("OpenGVLab/InternVL3_5-2B-Instruct", 16384, 256, 200_000),
    "4b": ("OpenGVLab/InternVL3_5-4B-Instruct", 16384, 256, 200_000),
    "8b": ("OpenGVLab/InternVL3_5-8B-Instruct", 16384, 256, 200_000),
    "14b": ("OpenGVLab/InternVL3_5-14B-Instruct", 16384, 256, 200_000),
    "38b": ("OpenGVLab/InternVL3_5-38B-Instruct", 16384, 256, 200_000),
    "20b-a4b": ("runs/sft_20b-a4b/model", 16384, 256, 200_000),
    "30b-a3b": ("OpenGVLab/InternVL3_5-30B-A3B-Instruct", 16384, 256, 200_000),
    "241b-a28b": ("OpenGVLab/InternVL3_5-241B-A28B-Instruct", 16384, 256, 200_000),
    "internvl3-1b": ("OpenGVLab/InternVL3-1B-Instruct", 12288, 256, 300_000),
    "internvl3-2b": ("OpenGVLab/InternVL3-2B-Instruct", 12288, 256, 300_000),
    "internvl3-8b": ("OpenGVLab/InternVL3-8B-Instruct", 12288, 256, 300_000),
    "internvl3-9b": ("OpenGVLab/InternVL3-9B-Instruct", 12288, 256, 300_000),
    "internvl3-14b": ("OpenGVLab/InternVL3-14B-Instruct", 12288, 256, 300_000),
    "internvl3-38b": ("OpenGVLab/InternVL3-38B-Instruct", 8192, 512, 300_000),
    "internvl3-78b": ("OpenGVLab/InternVL3-78B-Instruct", 8192, 512, 300_000),
}


def released() -> list[Path]:
    """The files under test, without those that they change."""
    stages = ("pretrain_", "posthoc_", "sft_", "mpo_", "prm_")
    files = [file for file in sorted(CONFIGS.glob("*.yaml")) if file.name.startswith(stages)]
    rest = {file: file.stem.partition("_")[2] for file in files}
    return [f for f in files if rest[f] not in TRIALS and not rest[f].startswith("lora_")]


def opened(stage: str, size: str) -> TrainConfig:
    """A configuration as ``cascadevl train`` reads it."""
    words = ["train", stage, str(CONFIGS / f"{stage}_{size}.yaml")]
    return read_config(make_parser().parse_args(words))


def differing(config: TrainConfig, *tables: dict[str, object]) -> dict[str, object]:
    """What a configuration says otherwise than the tables do."""
    expected = {key: value for table in tables for key, value in table.items()}
    found = {key: attrgetter(key)(config) for key in expected}
    return {key: value for key, value in found.items() if value != expected[key]}


@pytest.mark.parametrize("size", SFT_3_5_SIZES)
def test_sft_of_internvl3_5(size: str):
    start, lr, drop_path = SFT_3_5_SIZES[size]
    own = {"model.path": start, "optim.lr": lr, "model.drop_path": drop_path}
    config = opened("sft", size)
    assert differing(config, EVERY_STAGE, PACKED, SFT_3_5, own) == {}
    tokens = config.run.num_steps * 512 * config.batch.row_tokens
    assert tokens == pytest.approx(130e9, rel=0.05)  # the report's count


@pytest.mark.parametrize("size", PRETRAIN_3_5_SIZES)
def test_pretraining_of_internvl3_5(size: str):
    start, drop_path = PRETRAIN_3_5_SIZES[size]
    own = {"model.path": start, "model.drop_path": drop_path}
    config = opened("pretrain", size)
    assert differing(config, EVERY_STAGE, PACKED, PRETRAIN_3_5, own) == {}
    tokens = config.run.num_steps * 512 * config.batch.row_tokens
    assert tokens == pytest.approx(250e9, rel=0.02)  # the report's count


@pytest.mark.parametrize("size", SFT_3_SIZES)
def test_second_sft_of_internvl3(size: str):
    start, lr, drop_path = SFT_3_SIZES[size]
    own = {"model.path": start, "optim.lr": lr, "model.drop_path": drop_path}
    assert differing(opened("sft", size), EVERY_STAGE, SFT_3, own) == {}


@pytest.mark.parametrize("size", PRETRAIN_3_SIZES)
def test_pretraining_of_internvl3(size: str):
    start, drop_path = PRETRAIN_3_SIZES[size]
    own = {"model.path": start, "model.drop_path": drop_path}
    config = opened("pretrain", size)
    assert differing(config, EVERY_STAGE, PACKED, PRETRAIN_3, own) == {}
    tokens = config.run.num_steps * 512 * config.batch.row_tokens
    assert tokens == pytest.approx(200e9, rel=0.02)  # the report's count


@pytest.mark.parametrize("size", MPO_SIZES)
def test_mpo(size: str):
    start, max_tokens, batch, pairs = MPO_SIZES[size]
    own = {"model.path": start, "data.max_tokens": max_tokens, "run.global_batch": batch}
    config = opened("mpo", size)
    assert differing(config, EVERY_STAGE, MPO, own) == {}
    assert config.run.num_steps == pytest.approx(pairs / batch, abs=1)


@pytest.mark.parametrize("preset", TRIALS)
def test_mpo_of_our_presets_weighs_its_terms_as_released(preset: str):
    weights = {key: value for key, value in MPO.items() if key.startswith("mpo.")}
    assert differing(opened("mpo", preset), weights) == {}


def test_process_reward_model_as_visualprm():
    """arXiv 2503.10291: InternVL2.5-8B, 1e-5, warm-up 5 %, cosine, one epoch of 400,000."""
    own = {
        "model.path": "OpenGVLab/InternVL2_5-8B",
        "optim.lr": 1e-5,
        "optim.warmup_ratio": 0.05,
        "prm.form": "vocabulary",
        "prm.minus_weight": 1.0,
        "prm.before": "labels",
    }
    config = opened("prm", "8b")
    assert differing(config, {**EVERY_STAGE, **own}) == {}
    assert config.run.num_steps == 400_000 // config.run.global_batch
    assert [opened("prm", preset).prm.minus_weight for preset in TRIALS] == [1.0, 1.0]


def test_gpt_oss_warms_its_projector_up_first():
    config = opened("posthoc", "20b-a4b")
    assert isinstance(config, PosthocConfig)
    stage_0 = WarmupConfig(num_steps=5000, lr=1e-3, global_batch=256, max_tokens=16384)
    assert config.warmup == stage_0
    own = {"model.path": None, "model.drop_path": 0.1, "run.seed": 22110}
    assert differing(config, EVERY_STAGE, PACKED, PRETRAIN_3_5, own) == {}


def test_every_released_size_has_its_files_and_no_other_is_there():
    sizes = {*PRETRAIN_3_5_SIZES, *PRETRAIN_3_SIZES}
    assert sizes == {model.preset for model in ZOO.values() if model.preset}
    files = {f"{stage}_{size}" for stage in ("pretrain", "sft", "mpo") for size in sizes}
    assert {file.stem for file in released()} == {*files, "posthoc_20b-a4b", "prm_8b"}


@pytest.mark.parametrize("model", [model for model in ZOO.values() if model.preset])
def test_starts_on_the_hub_are_repositories_of_the_size(model):
    path = opened("sft", model.preset).model.path
    if model.preset == "20b-a4b":
        assert "-Pretrained" not in model.suffixes  # so it starts from one's own run
    elif model.name.startswith("InternVL3.5"):
        assert path == f"{model.hub_id}-Pretrained"
        assert "-Pretrained" in model.suffixes
    else:
        assert path == model.hub_id
    if model.preset != "20b-a4b":
        assert opened("mpo", model.preset).model.path == f"{model.hub_id}-Instruct"
        assert "-Instruct" in model.suffixes


def test_every_value_has_its_source_beside_it():
    for file in [*released(), *(CONFIGS / "bases").glob("*.yaml")]:
        for line in file.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition("#")[0].partition(":")
            if not value.strip() or key.strip() in ("base", "out"):
                continue
            assert SOURCE.search(line), f"{file.name}: {line}"


def test_runs_do_not_share_a_folder():
    for file in released():
        stage, _, size = file.stem.partition("_")
        assert opened(stage, size).run.out == Path("runs") / file.stem
