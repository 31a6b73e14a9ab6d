"""The vision half of a checkpoint with the token embedding: all that prompts are made of.

Where a server holds the language half, this process needs the vision tower, the projector and the
token embedding only. The rest of the model stays without memory, so that the largest checkpoint
opens on a small machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.part import load_part

_PARTS = (
    "model.vision_tower.",
    "model.multi_modal_projector.",
    "model.compressed_projector.",
    "model.router.",
)
_EMBEDDING = "model.language_model.embed_tokens."


def load_vision_half(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str = "cpu",
    embedding: bool = True,
) -> tuple[CascadeVLForConditionalGeneration, CascadeVLProcessor]:
    """Open a checkpoint without the layers and the head of its language model.

    ``encode_images`` and the token embedding of the model that is returned work; what needs the
    language model does not, because its other tensors are on the ``meta`` device.

    Args:
        name_or_path: As for `cascadevl.model.loading.load`.
        dtype: Type of the weights; ``"auto"`` keeps what the files hold.
        device: Where the weights go.
        embedding: Whether the token embedding is read, too.

    Returns:
        The model, in evaluation mode, and its processor.

    Raises:
        CheckpointError: If it is not there, of no known format, broken, or its tensors do not
            fit its configuration.
    """
    wanted = (*_PARTS, _EMBEDDING) if embedding else _PARTS
    return load_part(name_or_path, lambda name: name.startswith(wanted), dtype=dtype, device=device)
