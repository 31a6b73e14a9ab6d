from __future__ import annotations

import pytest
import torch
from transformers import InternVLForConditionalGeneration

from cascadevl.data.conversation import TEMPLATES
from cascadevl.errors import ConfigError
from cascadevl.model.zoo import ZOO, config_for

# Where counting every stored parameter once does not give the report's figure; see zoo.py.
DIFFERENT = {"InternVL3-2B": 2.09, "InternVL3-8B": 7.94, "InternVL3-9B": 9.14}


def count_billion(name: str) -> float:
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config_for(name))
    return sum(parameter.numel() for parameter in model.parameters()) / 1e9


IN_THE_TABLES = [name for name, model in ZOO.items() if model.report_billion is not None]


@pytest.mark.parametrize("name", IN_THE_TABLES)
def test_built_size_has_the_parameters_of_the_reports_table(name: str) -> None:
    count = count_billion(name)
    report = ZOO[name].report_billion
    assert report is not None
    if name in DIFFERENT:
        assert round(count, 2) == DIFFERENT[name]
        assert abs(count - report) / report < 0.1
    else:
        assert round(count, 1) == report


def test_one_table_for_embedding_and_head_explains_the_2b_row() -> None:
    config = config_for("InternVL3-2B")
    table = config.text_config.vocab_size * config.text_config.hidden_size / 1e9
    assert round(count_billion("InternVL3-2B") - table, 1) == ZOO["InternVL3-2B"].report_billion


def test_every_size_of_both_reports_is_there() -> None:
    internvl3 = {f"InternVL3-{size}" for size in ("1B", "2B", "8B", "9B", "14B", "38B", "78B")}
    dense = {f"InternVL3.5-{size}" for size in ("1B", "2B", "4B", "8B", "14B", "38B")}
    experts = {f"InternVL3.5-{size}" for size in ("20B-A4B", "30B-A3B", "241B-A28B")}
    assert set(IN_THE_TABLES) == internvl3 | dense | experts | {"InternVL2.5-8B"}


def test_the_released_flash_sizes_are_there() -> None:
    """Which of them were released: all dense ones and 30B-A3B."""
    sizes = ("1B", "2B", "4B", "8B", "14B", "38B", "30B-A3B")
    flash = {name: model for name, model in ZOO.items() if model.flash}
    assert (
        set(flash) == {f"InternVL3.5-{size}-Flash" for size in sizes} == set(ZOO) - {*IN_THE_TABLES}
    )
    for name, model in flash.items():
        plain = ZOO[name.removesuffix("-Flash")]
        assert model.hub_id == f"{plain.hub_id}-Flash"
        assert (model.vision, model.language) == (plain.vision, plain.language)
        config = config_for(name)
        assert (config.tokens_per_tile, config.compressed_tokens) == (256, 64)
        assert (config.flash_layers, config.flash_heads) == ("released", 16)
        assert not config_for(plain.name).flash_mode


@pytest.mark.parametrize("name", ZOO)
def test_entries_agree_with_themselves(name: str) -> None:
    model, config = ZOO[name], config_for(name.lower())
    is_large = model.vision == "InternViT-6B"
    assert is_large == any(size in name for size in ("38B", "78B", "241B"))
    assert config.vision_config.use_qk_norm is is_large
    assert config.tokens_per_tile == config.image_seq_length == 256
    assert config.image_token_id < config.text_config.vocab_size
    assert model.template in TEMPLATES
    assert ("gpt_oss" in model.template) == (config.text_config.model_type == "gpt_oss")


def test_unknown_size_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'InternVL3\.5-8B'"):
        config_for("InternVL35-8B")
