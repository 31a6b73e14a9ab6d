"""Freezing of the vision tower, the projector and the language part, each on its own."""

from __future__ import annotations

import pytest
import torch
from tests.model.packed import head, packed_batch
from tests.model.small import small_model

PARTS = {
    "vision": "model.vision_tower.",
    "projector": "model.multi_modal_projector.",
    "language": ("model.language_model.", "lm_head."),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", [(), ("vision",), ("projector",), ("vision", "language")])
def test_exactly_the_named_parts_get_no_gradient(frozen: tuple[str, ...], tied: bool) -> None:
    model = small_model(tie_word_embeddings=tied, text={"tie_word_embeddings": tied})
    model.freeze(vision=True, projector=True, language=True)  # what was frozen can be freed
    model.freeze(**dict.fromkeys(frozen, True))
    batch = packed_batch([[1], [2]])
    model.train()(batch=batch, head_fn=head(batch)).sum().backward()
    for name, parameter in model.named_parameters():
        is_frozen = any(name.startswith(PARTS[part]) for part in frozen)
        assert (parameter.grad is None) == is_frozen, name


def test_a_frozen_vision_half_builds_no_graph() -> None:
    model = small_model()
    model.freeze(vision=True, projector=True)
    assert not model.encode_images(torch.randn(1, 3, 28, 28)).projected.requires_grad
