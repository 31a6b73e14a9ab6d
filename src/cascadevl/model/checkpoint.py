"""A checkpoint folder opened: its configuration, its tensors by our names, and whether they fit.

Loading and conversion both start here, so what one refuses the other refuses too. Names and
shapes are held against a model built from the configuration on the ``meta`` device, before any
tensor is read.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from cascadevl.data.conversation import IMAGE_CONTEXT
from cascadevl.errors import CheckpointError
from cascadevl.model.adapter_files import is_adapter_folder
from cascadevl.model.checkpoint_names import (
    FLASH_PREFIXES,
    Layout,
    Reader,
    Recipe,
    detect_layout,
    split_experts,
    through,
    to_hub,
)
from cascadevl.model.config_files import (
    OBSTACLE_KEY,
    Json,
    default_template,
    hf_config,
    is_github,
    read_json,
    uses_internlm2_names,
)
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.internlm import FusedAttention
from cascadevl.model.projector import CompressedProjector
from cascadevl.model.router import Router
from cascadevl.model.tensor_files import TensorFiles
from cascadevl.model.tokenizer_files import load_tokenizer

HEAD = "lm_head.weight"
_WRITTEN_ANEW = {"model_type", "transformers_version", OBSTACLE_KEY}
_SHOWN = 3  # names of each sort in an error


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint that fits its configuration.

    Attributes:
        path: Its folder.
        layout: The layout of its files.
        config: Its configuration in the -HF form, which may be wrong about `tied`.
        files: Its tensors by the names in the files.
        recipes: How each tensor of the ``hf`` layout is made of those.
        fused: How queries, keys and values interleave, if its language model is InternLM2.
        left_out: The same for tensors that the model has no use for: the second projector and the
            router of a Flash checkpoint, where the configuration switches them off.
    """

    path: Path
    layout: Layout
    config: Json
    files: TensorFiles
    recipes: Mapping[str, Recipe]
    fused: FusedAttention | None
    left_out: Mapping[str, Recipe]

    @property
    def tied(self) -> bool:
        """Whether the output head is the token embedding: only if no head is stored."""
        return HEAD not in self.recipes

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the ``hf`` layout."""
        return through(self.files.read, self._recipes_with(name))(name)

    def outline(self, name: str) -> Tensor:
        """Shape and type of a tensor by its name in the ``hf`` layout, on the ``meta`` device."""
        return through(self.files.outline, self._recipes_with(name))(name)

    def _recipes_with(self, name: str) -> Mapping[str, Recipe]:
        return self.left_out if name in self.left_out else self.recipes


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint in a folder, of any layout, in one file or several.

    Raises:
        CheckpointError: If it is of no known format, a file is missing or broken, or a tensor is
            missing, unexpected or of another shape than its configuration says.
    """
    if is_adapter_folder(path):
        raise CheckpointError(
            f"{path} is an adapter, not a model; merge it into its base first: "
            f"cascadevl merge {path} --out DIR"
        )
    config = read_json(path / "config.json")
    files = TensorFiles.open(path)
    layout = detect_layout(files.places)
    if layout is None or (layout == "github") != is_github(config):
        raise CheckpointError(
            f"{path}: neither in the GitHub nor in the -HF format of InternVL: config.json is of "
            f"model type {config.get('model_type')!r}, the first tensor is "
            f"{next(iter(files.places), None)!r}"
        )
    fused = fused_attention(config)
    names = to_hub(files.places, layout, fused if layout == "github" else None)
    recipes = dict(names.recipes)
    left_out: dict[str, Recipe] = {}
    if not config.get("flash_mode"):
        flash = [name for name in recipes if name.startswith(FLASH_PREFIXES)]
        left_out = {name: recipes.pop(name) for name in flash}
    checkpoint = Checkpoint(
        path=path,
        layout=layout,
        config=_hf_form(config, path, tied=HEAD not in names.recipes),
        files=files,
        recipes=recipes,
        fused=fused,
        left_out=left_out,
    )
    expected = expected_shapes(configuration(checkpoint))
    if checkpoint.tied:
        expected.pop(HEAD)
    check_tensors(path, checkpoint.recipes, checkpoint.outline, expected, names.unknown)
    return checkpoint


def configuration(checkpoint: Checkpoint) -> CascadeVLConfig:
    """The configuration of a checkpoint as an object.

    Raises:
        CheckpointError: If a value in it means nothing.
    """
    return config_object(checkpoint.config, checkpoint.path / "config.json", tied=checkpoint.tied)


def config_object(config: Json, file: Path | str, *, tied: bool) -> CascadeVLConfig:
    """A configuration of the -HF form as an object.

    Args:
        config: The configuration.
        file: Where it comes from, for errors.
        tied: Whether the output head is the token embedding; only the tensors tell.

    Raises:
        CheckpointError: If a value in it means nothing.
    """
    values = copy.deepcopy(config)  # transformers writes into what it is given
    text = values.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(f"{file} has no 'text_config'")
    text["tie_word_embeddings"] = values["tie_word_embeddings"] = tied
    values.setdefault("template", default_template(text))
    values.setdefault("dtype", values.pop("torch_dtype", None))
    fields = {field.name for field in dataclasses.fields(CascadeVLConfig)}
    try:
        result = CascadeVLConfig(**{key: values[key] for key in values if key in fields})
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    for key in values.keys() - fields - _WRITTEN_ANEW:
        setattr(result, key, values[key])  # kept, for whoever knows them
    return result


def fused_attention(config: Json) -> FusedAttention | None:
    """How InternLM2 interleaves queries, keys and values; None for all other language models.

    Args:
        config: A configuration of either form.
    """
    if not uses_internlm2_names(config):
        return None
    text = config["llm_config"] if is_github(config) else config["text_config"]
    heads = text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or heads
    return FusedAttention(num_key_value_heads=kv_heads, num_groups=heads // kv_heads)


def expected_shapes(config: CascadeVLConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the files of such a model hold, by names of the ``hf`` layout."""
    with torch.device("meta"):
        state = InternVLForConditionalGeneration(config).state_dict()
        if config.flash_mode:
            for prefix, part in zip(
                FLASH_PREFIXES, (CompressedProjector(config), Router(config)), strict=True
            ):
                state |= {prefix + name: tensor for name, tensor in part.state_dict().items()}
    recipes = split_experts({name: tuple(tensor.shape) for name, tensor in state.items()})
    read = through(state.__getitem__, recipes)
    return {name: tuple(read(name).shape) for name in recipes}


def _hf_form(config: Json, path: Path, *, tied: bool) -> Json:
    if not is_github(config):
        return config
    token = load_tokenizer(path).convert_tokens_to_ids(IMAGE_CONTEXT)
    assert isinstance(token, int)
    try:
        return hf_config(config, image_token_id=token, tied=tied)
    except CheckpointError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path / 'config.json'}: a value cannot be used ({error})"
        ) from error


def check_tensors(
    path: Path,
    names: Collection[str],
    outline: Reader,
    expected: Mapping[str, tuple[int, ...]],
    unknown: Iterable[str] = (),
) -> None:
    """Hold the tensors of a folder against those that its configuration asks for.

    Args:
        path: The folder.
        names: Names in the ``hf`` layout of what it holds.
        outline: Gives shape and type of such a tensor.
        expected: Shape of every tensor that must be there.
        unknown: Names in the files that have none in the ``hf`` layout.

    Raises:
        CheckpointError: If a tensor is missing, unexpected or of another shape.
    """
    missing = [name for name in expected if name not in names]
    unexpected = [*unknown, *(name for name in names if name not in expected)]
    misshapen = [
        f"{name} is {found} but should be {shape}"
        for name, shape in expected.items()
        if name in names and (found := _shape(outline, name)) != shape
    ]
    problems = [
        f"{len(names)} {word} ({_some(names)})"
        for word, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
        )
        if names
    ]
    if problems:
        hint = (
            "; *_blocks and *_scales are MXFP4 weights: export the checkpoint in bfloat16 first"
            if any(name.endswith(("_blocks", "_scales")) for name in unexpected)
            else ""
        )
        raise CheckpointError(
            f"{path}: tensors do not fit config.json: {'; '.join(problems)}{hint}"
        )


def _shape(outline: Reader, name: str) -> tuple[int, ...] | None:
    """A tensor's shape; None if what it is made of cannot even be taken apart."""
    try:
        return tuple(outline(name).shape)
    except (RuntimeError, IndexError):
        return None


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
