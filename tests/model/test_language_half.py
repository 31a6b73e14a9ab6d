from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.model import make_checkpoints as make

from cascadevl.errors import RequestError
from cascadevl.model.language_half import load_language_half
from cascadevl.model.loading import load


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gpt_oss"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_the_half_says_what_the_whole_does_and_holds_nothing_else(
    family: str, tied: bool, tmp_path: Path
) -> None:
    folder = make.write_github(tmp_path / "github", family, tied=tied)
    whole, _ = load(folder)
    half, _ = load_language_half(folder)
    ids = torch.arange(8, 20)[None]
    with torch.inference_mode():
        assert torch.equal(half(ids).logits, whole(ids).logits)
    names = {name for name, _ in half.named_parameters()}
    vision = ("model.vision_tower.", "model.multi_modal_projector.")
    assert names == {n for n, _ in whole.named_parameters() if not n.startswith(vision)}
    assert not any(tensor.is_meta for tensor in half.parameters())
    assert not any(tensor.is_meta for tensor in half.buffers())
    assert (half.device, half.dtype) == (whole.device, whole.dtype)


def test_pictures_are_refused_with_a_word_on_what_to_give(tmp_path: Path) -> None:
    half, _ = load_language_half(make.write_github(tmp_path / "github", "qwen3"))
    with pytest.raises(RequestError, match="visual tokens instead"):
        half.encode_images(torch.zeros(1, 3, 56, 56))
