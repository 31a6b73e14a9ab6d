"""Adapter folders in peft's own format: written, recognised, and put into a base model.

A folder holds adapter_config.json and adapter_model.safetensors, which
`peft.PeftModel.from_pretrained` opens on our model and on transformers' InternVL alike. A third
file, which peft leaves alone, keeps what training decided beside the weights.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import peft
import torch
from peft import functional
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cascadevl.errors import CheckpointError
from cascadevl.model.adapters import (
    ADAPTER,
    adapter_parameters,
    fingerprint,
    has_adapters,
    inject,
    sharing,
)
from cascadevl.model.config_files import read_json, write_json
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.tensor_files import new_folder

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OWN_FILE = "cascadevl_adapter.json"
"""Holds `SETTINGS` of the trained model, and the fingerprint of its base."""

SETTINGS = ("increment", "trained_context", "process_prompt")
"""Keys of the model's configuration that training sets."""

_PREFIX = "base_model.model."  # peft's files name weights as its wrapper does


def save_adapter(
    model: CascadeVLForConditionalGeneration, path: str | Path, *, base: str | Path
) -> None:
    """Write a model's adapter, and nothing else of it.

    Args:
        model: A model with an adapter.
        path: Folder to make; may exist if it is empty. It appears complete or not at all.
        base: The model it belongs to: a folder, kept as an absolute path, or a repository's name.

    Raises:
        CheckpointError: If the folder exists and is not empty.
    """
    config = dataclasses.replace(_described(model))
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else str(base)
    config.inference_mode = True
    tensors = {
        _PREFIX + name: tensor.detach().cpu().contiguous()
        for name, tensor in _stored_tensors(model).items()
    }
    own = {name: getattr(model.config, name) for name in SETTINGS}
    with new_folder(Path(path)) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        write_json(folder / OWN_FILE, {**own, "base_fingerprint": fingerprint(model)})


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (path / CONFIG_FILE).is_file() and not (path / "config.json").exists()


def base_of(path: Path) -> str:
    """Where the base model of an adapter was when it was trained.

    Raises:
        CheckpointError: If the adapter does not say.
    """
    base = read_json(path / CONFIG_FILE).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{path / CONFIG_FILE} does not name the base model; give it as base")
    return str(base)


def is_adapter_of(model: CascadeVLForConditionalGeneration, path: Path) -> bool:
    """Whether the adapter in a folder was trained on this model's weights, as far as it says so.

    Args:
        model: A model without adapters.
        path: A folder that `save_adapter` or peft wrote.
    """
    own = read_json(path / OWN_FILE) if (path / OWN_FILE).is_file() else {}
    return "base_fingerprint" in own and own["base_fingerprint"] == fingerprint(model)


def put_adapter(model: CascadeVLForConditionalGeneration, path: Path) -> None:
    """Put the adapter in a folder into its base model, in place, in the base weights' type.

    Args:
        model: The base.
        path: A folder that we, or peft on transformers' InternVL, wrote.

    Raises:
        CheckpointError: If the adapter is no LoRA, or of another model, or a file is broken.
    """
    _check_kind(path)
    own = read_json(path / OWN_FILE) if (path / OWN_FILE).is_file() else {}
    found = fingerprint(model)
    if own.get("base_fingerprint", found) != found:
        raise CheckpointError(
            f"{path}: the adapter was trained on a model with other weights (fingerprint "
            f"{own['base_fingerprint']}, this one has {found}); give the base it was trained on"
        )
    try:
        stored = load_file(path / WEIGHTS_FILE)
        inject(model, peft.LoraConfig.from_pretrained(str(path)))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: the adapter cannot be opened: {error}") from error
    _fill(model, {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}, path)
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)
    for name in SETTINGS:
        if name in own:
            setattr(model.config, name, own[name])
    model.train(False)


def with_adapter(
    model: CascadeVLForConditionalGeneration, path: Path
) -> CascadeVLForConditionalGeneration:
    """A second model of the same weights, with the adapter in a folder; the first stays as it is.

    So a judge that was trained as an adapter of the model that answers costs no second copy of it.

    Args:
        model: The base.
        path: As for `put_adapter`.

    Raises:
        CheckpointError: As `put_adapter`, also if the base has an adapter of its own.
    """
    if has_adapters(model):
        raise CheckpointError(
            f"{path} cannot be put beside the adapter that the model has already; merge that one "
            f"first: cascadevl merge ADAPTER --out DIR"
        )
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    second = sharing(model)
    assert isinstance(second, CascadeVLForConditionalGeneration), "a copy is of the same class"
    try:
        put_adapter(second, path)
    finally:
        for parameter, is_trained in trained.items():  # peft freezes what it finds
            parameter.requires_grad_(is_trained)
    return second


def _check_kind(path: Path) -> None:
    config = read_json(path / CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: an adapter of kind {config.get('peft_type')}, not LORA")
    for key in ("modules_to_save", "trainable_token_indices"):
        if config.get(key):
            raise CheckpointError(
                f"{path}: the adapter also replaces whole modules ({key} is {config[key]}), which "
                "is not supported; merge it with peft where it was trained"
            )


def _fill(model: CascadeVLForConditionalGeneration, stored: dict[str, Tensor], path: Path) -> None:
    own = _stored_tensors(model)
    odd = sorted(own.keys() ^ stored.keys())
    odd += [name for name in own if name in stored and own[name].shape != stored[name].shape]
    if odd:
        raise CheckpointError(
            f"{path}: the adapter fits another model: {len(odd)} of {len(own)} tensors differ in "
            f"name or shape, the first is {odd[0]}; give the base it was trained on"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])


def _described(model: CascadeVLForConditionalGeneration) -> peft.LoraConfig:
    """The description of a model's adapter, which peft keeps as an attribute of the model."""
    config: peft.LoraConfig = model.peft_config[ADAPTER]
    return config


def _stored_tensors(model: CascadeVLForConditionalGeneration) -> dict[str, Tensor]:
    """The adapter's tensors, not copies of them, under the names of peft's files."""
    tensors: dict[str, Tensor] = functional.get_peft_model_state_dict(
        model, adapter_name=ADAPTER, save_embedding_layers=False
    )
    return tensors
