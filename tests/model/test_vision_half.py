from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model import make_checkpoints as make

from cascadevl.errors import CheckpointError
from cascadevl.model.loading import load
from cascadevl.model.vision_half import load_vision_half


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "github"
    return make.write_github(path, "qwen3", tied=request.param, num_files=2)


@pytest.fixture(scope="module")
def half(folder: Path) -> Any:
    return load_vision_half(folder)


def test_the_half_makes_the_same_embeddings_and_holds_nothing_else(folder: Path, half: Any) -> None:
    whole, _ = load(folder)
    model, _ = half
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(
            model.encode_images(pixels).projected, whole.encode_images(pixels).projected
        )
    assert torch.equal(model.get_input_embeddings().weight, whole.get_input_embeddings().weight)
    held = {name for name, tensor in model.named_parameters() if not tensor.is_meta}
    assert held == {
        name
        for name, _ in whole.named_parameters()
        if name.startswith(("model.vision_tower.", "model.multi_modal_projector."))
        or name == "model.language_model.embed_tokens.weight"
    }
    assert model.generation_config.eos_token_id == whole.generation_config.eos_token_id


def test_the_type_of_the_half_can_be_chosen(folder: Path) -> None:
    model, _ = load_vision_half(folder, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in model.parameters() if not tensor.is_meta} == {torch.bfloat16}


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    tensors = make.github_tensors("qwen3")
    del tensors["language_model.model.norm.weight"]  # also where it would not be read
    source = make.write(tmp_path / "github", tensors, make.github_config("qwen3"))
    with pytest.raises(CheckpointError, match="1 missing"):
        load_vision_half(source)
