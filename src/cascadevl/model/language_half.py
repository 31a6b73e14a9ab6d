"""The language half of a checkpoint: all that answers once pictures are visual tokens.

Where a server encodes the pictures, this process needs the token embedding, the layers and the head
only. The vision half is not there at all, and says so where somebody asks for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.errors import RequestError
from cascadevl.model.checkpoint import HEAD
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.part import load_part

_LANGUAGE = "model.language_model."
_EMBEDDING = "model.language_model.embed_tokens."


class Absent(nn.Module):
    """Stands where a part of the model is not."""

    def __init__(self, part: str) -> None:
        """Name the part."""
        super().__init__()
        self.part = part

    def forward(self, *_: Any, **__: Any) -> None:
        """Refuse.

        Raises:
            RequestError: Always.
        """
        raise RequestError(
            f"the {self.part} is not part of this process; give visual tokens instead of pictures"
        )


def load_language_half(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str = "cpu",
    layers: bool = True,
) -> tuple[CascadeVLForConditionalGeneration, CascadeVLProcessor]:
    """Open a checkpoint without its vision tower and its projector.

    Args:
        name_or_path: As for `cascadevl.model.loading.load`.
        dtype: Type of the weights; ``"auto"`` keeps what the files hold.
        device: Where the weights go.
        layers: Whether the layers and the head are read; without them the token embedding is all
            that works, which is enough where another server computes them.

    Returns:
        The model, in evaluation mode, and its processor.

    Raises:
        CheckpointError: As `cascadevl.model.loading.load`.
    """
    model, processor = load_part(
        name_or_path,
        _is_language if layers else lambda name: name.startswith(_EMBEDDING),
        dtype=dtype,
        device=device,
    )
    model.set_submodule("model.vision_tower", Absent("vision tower"))
    model.set_submodule("model.multi_modal_projector", Absent("projector"))
    if model.config.flash_mode:
        model.set_submodule("model.compressed_projector", Absent("projector"))
        model.set_submodule("model.router", Absent("router"))
    model.tie_weights()
    if layers:
        nn.Module.to(model, torch.device(device))  # the buffers, which were in no file
    return model, processor


def _is_language(name: str) -> bool:
    return name == HEAD or name.startswith(_LANGUAGE)
