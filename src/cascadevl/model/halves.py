"""A vision tower alone or a language model alone, opened as one half of a checkpoint.

Repositories of the two halves name their tensors as the GitHub layout does, but for the prefix
that tells the halves apart; put in front, the prefix makes the tables of names apply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cascadevl.errors import CheckpointError
from cascadevl.model.adapter_files import is_adapter_folder
from cascadevl.model.checkpoint import check_tensors, fused_attention, open_checkpoint
from cascadevl.model.checkpoint_names import Layout, NameMap, Recipe, through, to_hub
from cascadevl.model.config_files import Json, is_github, language_part, read_json, vision_part
from cascadevl.model.internlm import FusedAttention
from cascadevl.model.tensor_files import TensorFiles

TOWER = "model.vision_tower."
"""How the names of the vision tower begin in the ``hf`` layout."""

_WHOLE = ("internvl", "internvl_chat")
_TOWERS: dict[str, Layout] = {"intern_vit_6b": "github", "internvl_vision": "hf"}
"""Model types of a vision tower alone, whatever its size, and the layout of its names."""

_PREFIXES: dict[Layout, str] = {"github": "vision_model.", "hf": TOWER}


@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """An opened half.

    Attributes:
        path: Its folder.
        config: Its own configuration in the -HF form.
        files: Its tensors by the names in the files.
        recipes: How each of its tensors of the ``hf`` layout is made of those.
        unknown: Names in the files that have none in the ``hf`` layout.
        whole: Whether the folder holds a whole checkpoint, of which this is a part.
    """

    path: Path
    config: Json
    files: TensorFiles
    recipes: Mapping[str, Recipe]
    unknown: tuple[str, ...]
    whole: bool = False

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the ``hf`` layout."""
        return through(self.files.read, self.recipes)(name)

    def outline(self, name: str) -> Tensor:
        """Shape and type of a tensor by its name in the ``hf`` layout, on the ``meta`` device."""
        return through(self.files.outline, self.recipes)(name)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Hold the tensors against the shapes that the configuration asks for.

        Raises:
            CheckpointError: If a tensor is missing, unexpected or of another shape.
        """
        check_tensors(self.path, self.recipes, self.outline, expected, self.unknown)


def open_vision(path: Path) -> Half:
    """Open the vision tower in a folder.

    Args:
        path: A repository of InternViT, in the form of the GitHub ones or transformers', or a
            checkpoint of any layout.

    Raises:
        CheckpointError: If it is neither of these, or a file is missing or broken.
    """
    config = read_json(path / "config.json")
    if is_github(config) or config.get("model_type") in _WHOLE:
        checkpoint = open_checkpoint(path)
        recipes = {n: r for n, r in checkpoint.recipes.items() if n.startswith(TOWER)}
        part = {
            **checkpoint.config["vision_config"],
            "drop_path_rate": checkpoint.config.get("drop_path_rate", 0.0),
        }
        return Half(
            path=path, config=part, files=checkpoint.files, recipes=recipes, unknown=(), whole=True
        )
    layout = _TOWERS.get(str(config.get("model_type")))
    if layout is None:
        raise CheckpointError(
            f"{path}: no vision tower: config.json is of model type {config.get('model_type')!r}, "
            f"not InternViT's ({', '.join(_TOWERS)}) and not InternVL's ({', '.join(_WHOLE)})"
        )
    part = vision_part(config) if layout == "github" else dict(config)
    part["drop_path_rate"] = config.get("drop_path_rate", 0.0)
    files = TensorFiles.open(path)
    names = _named(files, _PREFIXES[layout], layout)
    return Half(path=path, config=part, files=files, recipes=names.recipes, unknown=names.unknown)


def open_language(path: Path) -> Half:
    """Open the language model in a folder.

    Args:
        path: A text-only checkpoint of a family that the language half can be.

    Raises:
        CheckpointError: If it is none, or a file is missing or broken.
    """
    if is_adapter_folder(path):
        raise CheckpointError(f"{path} is an adapter, not a language model; merge it first")
    config = read_json(path / "config.json")
    if is_github(config) or "text_config" in config:
        raise CheckpointError(
            f"{path}: a multimodal checkpoint, not a language model; write its language half "
            f"alone first: cascadevl convert {path} DIR --language-only"
        )
    try:
        part = language_part(config)
        fused = fused_attention({"llm_config": config})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    files = TensorFiles.open(path)
    names = _named(files, "language_model.", "github", fused)
    return Half(path=path, config=part, files=files, recipes=names.recipes, unknown=names.unknown)


def _named(
    files: TensorFiles, prefix: str, layout: Layout, fused: FusedAttention | None = None
) -> NameMap:
    """Recipes for the ``hf`` tensors of files whose names lack a prefix of the layout."""
    names = to_hub((prefix + name for name in files.places), layout, fused)
    recipes = {
        name: Recipe(tuple(source.removeprefix(prefix) for source in recipe.sources), recipe.make)
        for name, recipe in names.recipes.items()
    }
    return NameMap(recipes, tuple(name.removeprefix(prefix) for name in names.unknown))
