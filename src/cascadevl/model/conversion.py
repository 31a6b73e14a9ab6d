"""From one released layout to another, tensor by tensor, without ever building the model.

Every value is copied bit for bit, so a checkpoint converted there and back is the same, and the
memory needed is that of one shard. What the target's configuration cannot say is kept in it
(`cascadevl.model.config_files.ORIGIN_KEY`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import GenerationConfig

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.model.checkpoint import (
    HEAD,
    configuration,
    fused_attention,
    open_checkpoint,
)
from cascadevl.model.checkpoint_names import Layout, Reader, from_hub, through
from cascadevl.model.config_files import Json, github_config, write_json
from cascadevl.model.repository_files import (
    copy_files,
    generation_config,
    load_processor,
    write_github_image_file,
    write_processor_files,
)
from cascadevl.model.tensor_files import MAX_SHARD_BYTES, new_folder, write_tensors


def convert(
    src: str | Path, dst: str | Path, *, layout: Layout, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write the checkpoint in ``src`` to ``dst`` in another layout.

    ``dst`` appears complete or not at all.

    Args:
        src: Folder of a checkpoint in any of the three layouts.
        dst: Folder to make; may exist if it is empty.
        layout: ``"github"``, ``"hf_old"`` (transformers up to 4.51) or ``"hf"``.
        max_shard_bytes: Largest size of a file of weights.

    Raises:
        CheckpointError: If the source does not fit its configuration, or the target exists.
    """
    source, target = Path(src), Path(dst)
    checkpoint = open_checkpoint(source)
    processor = load_processor(source)
    generation = generation_config(source, processor, configuration(checkpoint))
    with new_folder(target) as folder:
        copy_files(source, folder)
        write_checkpoint(
            folder,
            names=[*checkpoint.recipes, *checkpoint.left_out],
            read=checkpoint.read,
            outline=checkpoint.outline,
            config=checkpoint.config,
            processor=processor,
            generation=generation,
            layout=layout,
            max_shard_bytes=max_shard_bytes,
        )


def write_checkpoint(
    folder: Path,
    *,
    names: Iterable[str],
    read: Reader,
    outline: Reader,
    config: Json,
    processor: CascadeVLProcessor,
    generation: GenerationConfig,
    layout: Layout,
    max_shard_bytes: int,
) -> None:
    """Fill an existing folder with a checkpoint.

    Args:
        folder: The folder.
        names: Names of its tensors in the ``hf`` layout.
        read: Gives a tensor by such a name.
        outline: Gives its shape and type, on the ``meta`` device.
        config: Its configuration in the -HF form.
        processor: Its processor.
        generation: Its generation settings.
        layout: The layout to write.
        max_shard_bytes: Largest size of a file of weights.
    """
    names = list(names)
    fused = fused_attention(config) if layout == "github" else None
    recipes = from_hub(names, layout, fused).recipes
    write_tensors(
        folder,
        list(recipes),
        through(read, recipes),
        through(outline, recipes),
        max_shard_bytes=max_shard_bytes,
    )
    write_processor_files(folder, processor, generation)
    if layout == "github":
        write_github_image_file(folder, processor.tiling.tile_px)
        config = github_config(config, tied=HEAD not in names)
    write_json(folder / "config.json", config)
