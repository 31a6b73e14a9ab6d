"""The files that tell how a checkpoint wants its pictures and prompts: reading and writing.

Users hold two kinds of repositories. Those in the -HF layout bring processor files, which do not
name the conversation template; those in the GitHub layout bring none, and have it all in
``config.json``. Both are read to the same settings, and one set of files is written that plain
transformers opens too. The video file of released -HF repositories (384 px, CLIP's mean) is wrong
and never read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from cascadevl.data.conversation import TEMPLATES, template_named
from cascadevl.data.tiling import IMAGENET_MEAN, IMAGENET_STD, TilingConfig
from cascadevl.data.tokenizer import NAMED_TOKENS
from cascadevl.errors import CheckpointError

OWN_KEY = "cascadevl"
"""Key of ``processor_config.json`` that holds what transformers has no word for."""

_BICUBIC = 3  # PIL's number
_PROCESSOR_CLASS = "InternVLProcessor"

Json: TypeAlias = dict[str, Any]  # Any: files from outside, checked where they are used


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessorSettings:
    """What a processor needs beside its tokenizer.

    Attributes:
        template: Name of the conversation template.
        system_message: System message of conversations that have none; None for the template's.
        tiling: How pictures are cut.
        tokens_per_tile: Visual tokens of a full tile.
        share_tiles: Whether the pictures of one conversation share ``max_tiles``.
    """

    template: str
    system_message: str | None
    tiling: TilingConfig
    tokens_per_tile: int
    share_tiles: bool = True


def read_settings(
    name_or_path: str | Path, tokenizer: PreTrainedTokenizerBase, **hub_options: Any
) -> ProcessorSettings:
    """Read the settings of a checkpoint in either layout.

    What this package wrote itself goes first, then ``config.json``, then transformers' files.

    Args:
        name_or_path: A folder, or the name of a repository.
        tokenizer: The checkpoint's, to know the template where no file names it.
        **hub_options: Passed on to transformers' file cache (``revision``, ``token``, ...).

    Raises:
        CheckpointError: If there is neither a ``config.json`` nor a processor file, or a file
            holds what cannot be used.
        ConfigError: If the checkpoint's template is not known.
    """
    config, processor, images = (
        _read_json(name_or_path, name, hub_options)
        for name in ("config.json", "processor_config.json", "preprocessor_config.json")
    )
    images = images or processor.get("image_processor", {})
    if not config and not processor and not images:
        raise CheckpointError(
            f"{name_or_path}: neither config.json nor processor_config.json nor "
            "preprocessor_config.json is there; give the folder of a checkpoint"
        )
    _check_normalisation(name_or_path, images)
    own = processor.get(OWN_KEY, {})
    is_hf = bool(processor or images)
    name = own.get("template") or config.get("template") or _template_of(tokenizer, name_or_path)
    system = own.get("system_message", config.get("system_message", "" if is_hf else None))
    try:
        tiling = TilingConfig(**own["tiling"]) if "tiling" in own else _tiling(config, images)
        tokens = processor.get("image_seq_length") or config.get("image_seq_length")
        return ProcessorSettings(
            template=template_named(name).name,
            system_message=system,
            tiling=tiling,
            tokens_per_tile=int(tokens) if tokens else _tokens_per_tile(config, tiling.tile_px),
            share_tiles=bool(own.get("share_tiles", True)),
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{name_or_path}: its processor files cannot be used: {error}"
        ) from error


def _tiling(config: Mapping[str, Any], images: Mapping[str, Any]) -> TilingConfig:
    """From GitHub keys, our keys of ``config.json``, or transformers' image processor."""
    sizes = [
        size
        for size in (
            config.get("force_image_size"),
            _side(config.get("vision_config", {}).get("image_size")),
            _side(images.get("size")),
        )
        if size is not None
    ]
    tile_px = int(sizes[0]) if sizes else 448
    if any(size != tile_px for size in sizes):
        raise CheckpointError(
            f"config.json and the processor files name different tile sizes: {sizes} px"
        )
    values = {
        "min_tiles": ("min_tiles", "min_dynamic_patch", "min_patches"),
        "max_tiles": ("max_tiles", "max_dynamic_patch", "max_patches"),
        "thumbnail": ("use_thumbnail",),
        "dynamic": ("dynamic_image_size",),
    }
    both = {**images, **config}
    chosen = {
        field: next(both[key] for key in keys if both.get(key) is not None)
        for field, keys in values.items()
        if any(both.get(key) is not None for key in keys)
    }
    return TilingConfig(tile_px=tile_px, **chosen)


def _side(size: object) -> int | None:
    """A side in pixels from a number, a pair or transformers' object."""
    if isinstance(size, Mapping):
        size = size.get("height")
    if isinstance(size, list | tuple):
        size = size[0]
    return size if isinstance(size, int) else None


def _tokens_per_tile(config: Mapping[str, Any], tile_px: int) -> int:
    patch_px = _side(config.get("vision_config", {}).get("patch_size")) or 14
    ratio = float(config.get("downsample_ratio", 0.5))
    return math.floor((tile_px // patch_px) ** 2 * ratio**2)


def _template_of(tokenizer: PreTrainedTokenizerBase, name_or_path: str | Path) -> str:
    """The template whose control tokens the tokenizer has; -HF files do not name it."""
    vocabulary = tokenizer.get_vocab()
    for name, template in TEMPLATES.items():
        header = template.control_tokens[:1]
        if all(token in vocabulary for token in (*header, *template.stop_tokens[:1])):
            return name
    raise CheckpointError(
        f"{name_or_path}: no file names the conversation template, and the tokenizer has the "
        f"tokens of none of {', '.join(TEMPLATES)}"
    )


def _check_normalisation(name_or_path: str | Path, images: Mapping[str, Any]) -> None:
    for key, expected in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        found = images.get(key)
        if found is not None and tuple(found) != expected:
            raise CheckpointError(
                f"{name_or_path}: preprocessor_config.json has {key} {found}, but InternVL's "
                f"vision transformers take ImageNet's {list(expected)}; mend the file"
            )


def _read_json(name_or_path: str | Path, name: str, hub_options: Mapping[str, Any]) -> Json:
    path = cached_file(
        str(name_or_path),
        name,
        _raise_exceptions_for_gated_repo=True,
        _raise_exceptions_for_missing_entries=False,
        **hub_options,
    )
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def write_settings(
    settings: ProcessorSettings,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    folder: Path,
) -> list[Path]:
    """Write the files of a repository in the -HF layout, weights and ``config.json`` left out.

    Args:
        settings: What to write.
        tokenizer: Saved with them; its tokens get the names transformers looks for.
        chat_template: Written to ``chat_template.jinja``.
        folder: Where to; made if missing.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [Path(file) for file in tokenizer.save_pretrained(folder) if Path(file).exists()]
    tokenizer_config = folder / "tokenizer_config.json"
    saved = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    # `<video>` comes into being here if it was missing, one id past the embedding, as in released
    # -HF repositories. Nothing writes it into a prompt: videos are taken apart into frames.
    saved["extra_special_tokens"] = NAMED_TOKENS
    saved["processor_class"] = _PROCESSOR_CLASS
    saved.pop("chat_template", None)
    contents = {
        "tokenizer_config.json": saved,
        "preprocessor_config.json": _image_fields(settings),
        "video_preprocessor_config.json": _video_fields(settings),
        "processor_config.json": {
            "image_seq_length": settings.tokens_per_tile,
            "processor_class": _PROCESSOR_CLASS,
            OWN_KEY: {
                "template": settings.template,
                "system_message": settings.system_message,
                "share_tiles": settings.share_tiles,
                "tiling": asdict(settings.tiling),
            },
        },
    }
    for name, content in contents.items():
        text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    return sorted({*files, *(folder / name for name in (*contents, "chat_template.jinja"))})


def _image_fields(settings: ProcessorSettings) -> Json:
    tiling = settings.tiling
    return {
        **_pixel_fields(settings),
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": tiling.dynamic,
        "min_patches": tiling.min_tiles,
        "max_patches": tiling.max_tiles if tiling.dynamic else 1,
    }


def _video_fields(settings: ProcessorSettings) -> Json:
    return {
        **_pixel_fields(settings),
        "video_processor_type": "InternVLVideoProcessor",
        "initial_shift": True,
        "do_sample_frames": False,
    }


def _pixel_fields(settings: ProcessorSettings) -> Json:
    side = settings.tiling.tile_px
    return {
        "processor_class": _PROCESSOR_CLASS,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"height": side, "width": side},
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }
