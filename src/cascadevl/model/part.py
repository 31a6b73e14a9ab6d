"""Parts of a checkpoint: only what a process needs of it is read, so that large ones open anywhere.

A process that talks to servers needs no weights at all; one that encodes pictures needs the vision
half, one that answers the language half. What was not read stays without memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.model.checkpoint import Checkpoint, configuration, open_checkpoint
from cascadevl.model.checkpoint_names import fuse_experts, through
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.loading import find, placed
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.repository_files import adopt_settings, generation_config, load_processor


def load_settings(
    name_or_path: str | Path,
) -> tuple[CascadeVLConfig, CascadeVLProcessor, Checkpoint]:
    """Open a checkpoint without its weights.

    Args:
        name_or_path: As for `cascadevl.model.loading.load`.

    Returns:
        Its configuration, its processor, and the opened checkpoint.

    Raises:
        CheckpointError: As `load_part`.
    """
    checkpoint = open_checkpoint(find(name_or_path))
    config = configuration(checkpoint)
    processor = load_processor(checkpoint.path)
    adopt_settings(config, processor)
    return config, processor, checkpoint


def load_part(
    name_or_path: str | Path,
    is_wanted: Callable[[str], bool],
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str = "cpu",
) -> tuple[CascadeVLForConditionalGeneration, CascadeVLProcessor]:
    """Open a checkpoint with some of its tensors; the others are on the ``meta`` device.

    Args:
        name_or_path: As for `cascadevl.model.loading.load`.
        is_wanted: Says of a name of the model's ``state_dict`` whether it is read.
        dtype: Type of the weights; ``"auto"`` keeps what the files hold.
        device: Where the weights go.

    Returns:
        The model, in evaluation mode, and its processor.

    Raises:
        CheckpointError: If it is not there, of no known format, broken, or its tensors do not
            fit its configuration.
    """
    config, processor, checkpoint = load_settings(name_or_path)
    with init_empty_weights(include_buffers=False):
        model = CascadeVLForConditionalGeneration(config)
    recipes = fuse_experts(checkpoint.recipes)
    read = through(checkpoint.read, recipes)
    place = torch.device(device)
    state = {name: placed(read(name), dtype, place) for name in recipes if is_wanted(name)}
    _, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected, unexpected
    model.generation_config = generation_config(checkpoint.path, processor, config)
    model.train(False)
    return model, processor
