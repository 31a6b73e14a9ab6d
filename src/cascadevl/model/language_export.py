"""The language half of a checkpoint as a text-only checkpoint of its own.

Programs that know the language model but not ours (plain transformers, vLLM) open it. Tensors are
copied bit for bit, shard by shard, without building the model; only their names change.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from cascadevl.model.checkpoint import HEAD, configuration, open_checkpoint
from cascadevl.model.config_files import language_config, write_json
from cascadevl.model.repository_files import generation_config, load_processor
from cascadevl.model.tensor_files import MAX_SHARD_BYTES, new_folder, write_tensors

EMBEDDING = "model.embed_tokens.weight"
"""Name of the token embedding in a text-only checkpoint."""

_BODY = "model.language_model."


def export_language(
    src: str | Path, dst: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write the language half of the checkpoint in ``src`` to ``dst``.

    ``dst`` appears complete or not at all. InternLM2 is written as Llama, which it is but for the
    names. A head that is tied to the token embedding stays tied, one that is stored is written.

    Args:
        src: Folder of a checkpoint in any of the three layouts.
        dst: Folder to make; may exist if it is empty.
        max_shard_bytes: Largest size of a file of weights.

    Raises:
        CheckpointError: If the source does not fit its configuration, or the target exists.
    """
    source = Path(src)
    checkpoint = open_checkpoint(source)
    processor = load_processor(source)
    generation = generation_config(source, processor, configuration(checkpoint))
    names = language_names(checkpoint.recipes)
    dtype = str(checkpoint.outline(names[EMBEDDING]).dtype).removeprefix("torch.")
    with new_folder(Path(dst)) as folder:
        write_tensors(
            folder,
            list(names),
            lambda name: checkpoint.read(names[name]),
            lambda name: checkpoint.outline(names[name]),
            max_shard_bytes=max_shard_bytes,
        )
        write_json(
            folder / "config.json",
            language_config(checkpoint.config, tied=checkpoint.tied, dtype=dtype),
        )
        processor.tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(str(processor.chat_template), encoding="utf-8")
        generation.save_pretrained(folder)


def language_names(names: Collection[str]) -> dict[str, str]:
    """Names of a text-only checkpoint, each with the name its tensor has in the ``hf`` layout.

    Args:
        names: Names in the ``hf`` layout; those of the vision half are left out.
    """
    body = [name for name in names if name.startswith(_BODY)]
    head = {HEAD: HEAD} if HEAD in names else {}
    return {f"model.{name.removeprefix(_BODY)}": name for name in body} | head
