from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cascadevl.config import dump_config, load_config
from cascadevl.errors import ConfigError
from cascadevl.train.config import FREE_KEYS, ModelConfig, TrainConfig, plain
from cascadevl.train.gspo_config import GSPOConfig
from cascadevl.train.lora import LoraConfig
from cascadevl.train.router_config import RouterConfig

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    "name", sorted(p.name for stage in ("pretrain", "sft") for p in CONFIGS.glob(f"{stage}_*.yaml"))
)
def test_every_shipped_config_loads_and_survives_being_written(name: str, tmp_path: Path) -> None:
    config = load_config(TrainConfig, files=[CONFIGS / name])
    written = tmp_path / name
    written.write_text(dump_config(config), encoding="utf-8")
    assert load_config(TrainConfig, files=[written]) == config
    assert config != TrainConfig()


def test_defaults_are_those_of_the_released_sft_scripts() -> None:
    config = TrainConfig()
    assert (config.optim.lr, config.optim.weight_decay, config.optim.warmup_ratio) == (
        8e-5,
        0.05,
        0.03,
    )
    assert (config.optim.betas, config.optim.eps, config.optim.schedule) == (
        (0.9, 0.999),
        1e-8,
        "cosine",
    )
    assert (config.batch.row_tokens, config.batch.row_tiles, config.batch.buffer_rows) == (
        32768,
        96,
        20,
    )
    assert (config.batch.averaging, config.run.num_steps, config.run.seed) == ("square", 8000, 42)


def test_values_can_be_overridden_by_dotted_keys_and_typos_are_answered() -> None:
    config = load_config(
        TrainConfig,
        files=[CONFIGS / "pretrain_nano.yaml"],
        overrides=["optim.lr=5e-6", "data.increment=0.25", "model.frozen=[vision, projector]"],
    )
    assert config.optim.lr == 5e-6
    assert config.data.increment == 0.25
    assert config.model.frozen == ("vision", "projector")
    with pytest.raises(ConfigError, match=r"did you mean .*weight_decay"):
        load_config(TrainConfig, overrides=["optim.weight_decy=0.1"])


def test_two_starting_points_are_refused() -> None:
    with pytest.raises(ConfigError, match="one of them"):
        ModelConfig(path="a", preset="nano")


def test_free_keys_exist_and_the_plain_form_is_json() -> None:
    # Both together have every section that is meant.
    values = plain(RouterConfig()) | plain(GSPOConfig(lora=LoraConfig()))
    for key in FREE_KEYS:
        section, name = key.split(".")
        assert name in values[section]
    assert values["run"]["out"] == str(Path("runs/latest"))
    assert values["optim"]["betas"] == [0.9, 0.999]
    assert dataclasses.asdict(TrainConfig())["run"]["out"] == Path("runs/latest")
