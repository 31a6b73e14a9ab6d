"""Weights that stay in their files: filled part by part, they are those that `load` reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.model import make_checkpoints as make

from cascadevl.model.adapters import fingerprint
from cascadevl.model.loading import load
from cascadevl.model.unread import fill


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "gpt_oss", "internlm2"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_filled_part_by_part(tmp_path: Path, family: str, tied: bool) -> None:
    source = make.write_github(tmp_path / "source", family, tied=tied, num_files=2)
    expected, _ = load(source, dtype=torch.bfloat16)
    model, _ = load(source, dtype=torch.bfloat16, lazily=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.freeze(vision=True)

    layer = model.model.language_model.layers[1]
    fill(model, layer)
    assert not any(parameter.is_meta for parameter in layer.parameters())
    others = {id(p) for p in model.parameters()} - {id(p) for p in layer.parameters()}
    assert all(p.is_meta for p in model.parameters() if id(p) in others)

    fill(model)
    wanted = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted.pop(name)), name
        assert parameter.requires_grad == ("vision_tower" not in name)
        assert parameter.dtype == torch.bfloat16
    assert not wanted
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert fingerprint(model) == fingerprint(expected)
    for (name, buffer), (_, other) in zip(
        model.named_buffers(), expected.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, other), name


def test_values_that_are_there_stay(tmp_path: Path) -> None:
    source = make.write_github(tmp_path / "source", "qwen3")
    model, _ = load(source, lazily=True)
    fill(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    fill(model)
    assert not model.lm_head.weight.any()
