"""The vision half of a checkpoint with the token embedding: all that prompts are made of.

Where a server holds the language half, this process needs the vision tower, the projector and the
token embedding only. The rest of the model stays without memory, so that the largest checkpoint
opens on a small machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.model.checkpoint import configuration, open_checkpoint
from cascadevl.model.loading import find, placed
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.repository_files import adopt_settings, generation_config, load_processor

_PARTS = (
    "model.vision_tower.",
    "model.multi_modal_projector.",
    "model.language_model.embed_tokens.",
)


def load_vision_half(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str = "cpu",
) -> tuple[CascadeVLForConditionalGeneration, CascadeVLProcessor]:
    """Open a checkpoint without the layers and the head of its language model.

    ``encode_images`` and the token embedding of the model that is returned work; what needs the
    language model does not, because its other tensors are on the ``meta`` device.

    Args:
        name_or_path: As for `cascadevl.model.loading.load`.
        dtype: Type of the weights; ``"auto"`` keeps what the files hold.
        device: Where the weights go.

    Returns:
        The model, in evaluation mode, and its processor.

    Raises:
        CheckpointError: If it is not there, of no known format, broken, or its tensors do not
            fit its configuration.
    """
    checkpoint = open_checkpoint(find(name_or_path))
    config = configuration(checkpoint)
    processor = load_processor(checkpoint.path)
    adopt_settings(config, processor)
    with init_empty_weights(include_buffers=False):
        model = CascadeVLForConditionalGeneration(config)
    names = [name for name in checkpoint.recipes if name.startswith(_PARTS)]
    state = {name: placed(checkpoint.read(name), dtype, torch.device(device)) for name in names}
    _, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected, unexpected
    model.generation_config = generation_config(checkpoint.path, processor, config)
    model.train(False)
    return model, processor
