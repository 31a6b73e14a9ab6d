"""The files beside the weights: tokenizer, processor, generation settings.

A folder without them cannot be used ("Processor was not found" is a frequent complaint about
converted checkpoints).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import IMAGENET_MEAN, IMAGENET_STD
from cascadevl.errors import CheckpointError
from cascadevl.model.adapter_files import base_of, is_adapter_folder
from cascadevl.model.config_files import Json, read_json, write_json
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.tokenizer_files import TOKENIZER_FILES, load_tokenizer

_BICUBIC = 3  # PIL's number, which processor files use


def load_processor(path: Path) -> CascadeVLProcessor:
    """The processor of a checkpoint folder of any layout.

    Raises:
        CheckpointError: If tokenizer or settings are missing or cannot be used, or it is the folder
            of an adapter.
        ConfigError: If the conversation template is not known.
    """
    if is_adapter_folder(path):
        raise CheckpointError(
            f"{path} is an adapter; tokenizer and settings are those of its base, {base_of(path)}: "
            "name that one here"
        )
    return CascadeVLProcessor.from_pretrained(
        path, tokenizer=load_tokenizer(path), local_files_only=True
    )


def generation_config(
    path: Path | None, processor: CascadeVLProcessor, config: CascadeVLConfig
) -> GenerationConfig:
    """Generation settings that stop at the end of a turn, whatever the files say.

    Some released configurations name only ``<|endoftext|>`` as the end, which chat models do not
    write. So the ends are those of the template and those of the files together.

    Args:
        path: Checkpoint folder, whose generation_config.json is kept otherwise; None for none.
        processor: Knows the template's ends of a turn.
        config: Configuration of the model.
    """
    file = None if path is None else path / "generation_config.json"
    result = GenerationConfig(
        **(read_json(file) if file is not None and file.is_file() else {}),
    )
    ends: list[int] = []
    text: Any = config.text_config
    for stored in (result.eos_token_id, text.eos_token_id):
        ends += stored if isinstance(stored, list) else [] if stored is None else [stored]
    result.eos_token_id = list(processor.stop_token_ids(ends))
    if result.pad_token_id is None:
        result.pad_token_id = processor.tokenizer.pad_token_id
    return result


def adopt_settings(config: CascadeVLConfig, processor: CascadeVLProcessor) -> None:
    """Take over into a configuration what the processor's files say of template and tiling.

    The configurations of released -HF repositories do not mention them.
    """
    tiling = processor.tiling
    config.template = processor.settings.template
    config.system_message = processor.settings.system_message
    config.min_tiles = tiling.min_tiles if tiling.dynamic else 1
    config.max_tiles = tiling.max_tiles if tiling.dynamic else 1
    config.use_thumbnail = tiling.thumbnail and tiling.dynamic


def write_processor_files(
    folder: Path, processor: CascadeVLProcessor, generation: GenerationConfig
) -> None:
    """Write what a repository holds beside config.json and the weights.

    The same files serve both formats: GitHub repositories lack most of them, which is what makes
    them hard to use.
    """
    processor.save_pretrained(folder)
    generation.save_pretrained(folder)


def write_github_image_file(folder: Path, tile_px: int) -> None:
    """Write the image settings in the form that the remote code of GitHub repositories reads."""
    settings: Json = {
        "crop_size": tile_px,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "resample": _BICUBIC,
        "size": tile_px,
    }
    write_json(folder / "preprocessor_config.json", settings)


def copy_files(source: Path, folder: Path) -> None:
    """Copy what a conversion leaves as it is: the tokenizer's files and the repository's code.

    The code is only carried along, so that a GitHub repository converted there and back still
    opens with the official tools; nothing here runs it.
    """
    for file in (*(source / name for name in TOKENIZER_FILES), *sorted(source.glob("*.py"))):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
