"""One `load` for every released format, and `save` for our own.

A model is built empty and given the tensors of its files, so that no more memory is needed than
the model itself takes. Weights keep the type they have in the files; the rotary frequencies are
computed in float32, whatever the weights are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.errors import CheckpointError
from cascadevl.model.adapter_files import base_of, is_adapter_folder, put_adapter
from cascadevl.model.adapters import base_tensors, merged_reader
from cascadevl.model.checkpoint import HEAD, Checkpoint, configuration, open_checkpoint
from cascadevl.model.checkpoint_names import Layout, fuse_experts, split_experts, through
from cascadevl.model.config_files import OBSTACLE_KEY, Json
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.conversion import write_checkpoint
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.repository_files import adopt_settings, generation_config, load_processor
from cascadevl.model.shipped import SHIPPED, shipped_folder
from cascadevl.model.tensor_files import MAX_SHARD_BYTES, new_folder
from cascadevl.model.unread import leave_unread
from cascadevl.model.zoo import ZOO


def load(
    name_or_path: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str = "cpu",
    lazily: bool = False,
) -> tuple[CascadeVLForConditionalGeneration, CascadeVLProcessor]:
    """Open a checkpoint of any released format, or one of ours, or an adapter and its base.

    A stored output head is honoured even where the configuration calls it tied; it is tied to
    the token embedding only if there is none.

    Args:
        name_or_path: A folder; or the name of a repository that was downloaded before, for
            example ``"OpenGVLab/InternVL3_5-1B"``; or a name of `cascadevl.model.zoo.ZOO`; or
            ``"micro"``, the small model that comes with the package.
        base: Of an adapter: its base model, if that is no longer where it was in training.
        dtype: Type of the weights; ``"auto"`` keeps what the files hold.
        device: Where the weights go.
        lazily: Leave the weights in their files for now (`cascadevl.model.unread.fill`). Not for
            adapters, whose base is read at once.

    Returns:
        The model, in evaluation mode, and its processor.

    Raises:
        CheckpointError: If it is not there, of no known format, broken, or its tensors do not
            fit its configuration; if an adapter's base is not there, or is another model.
    """
    path = find(name_or_path)
    if is_adapter_folder(path):
        model, processor = load(_base_folder(path, base), dtype=dtype, device=device)
        put_adapter(model, path)
        return model, processor
    if base is not None:
        raise CheckpointError(f"{path} is a model of its own, not an adapter; leave base out")
    checkpoint = open_checkpoint(path)
    config = configuration(checkpoint)
    processor = load_processor(checkpoint.path)
    adopt_settings(config, processor)
    model = _built(config, checkpoint, dtype, torch.device(device), lazily=lazily)
    model.generation_config = generation_config(checkpoint.path, processor, config)
    return model, processor


def find(name_or_path: str | Path, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: in the file system, the package or the Hugging Face cache.

    A folder of that name goes first. Nothing is downloaded.

    Args:
        name_or_path: As for `load`.
        weights: Whether the caller reads them; only the advice depends on it.

    Raises:
        CheckpointError: If there is none; says how to get it.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    name = str(name_or_path)
    if name in SHIPPED:
        return shipped_folder(name)
    released = {known.lower(): model.hub_id for known, model in ZOO.items()}
    repository = released.get(name.lower(), name)
    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        is_hub_name = repository.count("/") == 1 and not repository.startswith((".", "/", "~"))
        how = "name the folder of a model"
        if is_hub_name:
            how = f"name its folder, or download it first: hf download {repository}"
            how += "" if weights else " --exclude '*.safetensors' (no weights are needed here)"
        raise CheckpointError(
            f"{name!r} is neither a folder nor a repository in the local Hugging Face cache; {how}"
        ) from error


def save(
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    path: str | Path,
    *,
    layout: Layout = "hf",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a checkpoint: the -HF layout plus our own keys in config.json.

    Adapters are merged into the weights that are written; the model keeps them as they are.

    It opens in plain transformers. Where that would compute something else (pixel shuffle v1, an
    increment other than 1, compressed tiles), config.json says so under ``cascadevl_requires``,
    and names our class as its architecture, which other programs refuse instead of giving wrong
    answers.

    Args:
        model: The model.
        processor: Its processor.
        path: Folder to make; may exist if it is empty. It appears complete or not at all.
        layout: ``"hf"``, or another for the tools that want it.
        max_shard_bytes: Largest size of a file of weights.

    Raises:
        CheckpointError: If the folder exists and is not empty.
    """
    state = base_tensors(model)
    if model.config.tie_word_embeddings:
        state.pop(HEAD, None)
    recipes = split_experts({name: tuple(tensor.shape) for name, tensor in state.items()})
    outlines = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    read = merged_reader(model)
    with new_folder(Path(path)) as folder:
        write_checkpoint(
            folder,
            names=recipes,
            read=through(lambda name: read(name).cpu(), recipes),
            outline=through(outlines.__getitem__, recipes),
            config=_config_json(model),
            processor=processor,
            generation=generation_config(None, processor, model.config),
            layout=layout,
            max_shard_bytes=max_shard_bytes,
        )


def _base_folder(adapter: Path, base: str | Path | None) -> Path:
    try:
        return find(base_of(adapter) if base is None else base)
    except CheckpointError as error:
        raise CheckpointError(
            f"{adapter} is an adapter, and its base model is not there: {error}. Say where it is: "
            "cascadevl.load(adapter, base=...), or cascadevl merge ADAPTER --base DIR --out DIR"
        ) from error


def _built(
    config: CascadeVLConfig,
    checkpoint: Checkpoint,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device,
    *,
    lazily: bool,
) -> CascadeVLForConditionalGeneration:
    # Only parameters are left empty: buffers (rotary frequencies) are in no file and are computed.
    with init_empty_weights(include_buffers=False):
        model = CascadeVLForConditionalGeneration(config)
    recipes = fuse_experts(checkpoint.recipes)
    stored = through(checkpoint.read, recipes)

    def read(name: str) -> Tensor:
        return placed(stored(name), dtype, device)

    if lazily:
        expected = {name for name, _ in model.named_parameters()}
        assert expected - recipes.keys() <= ({HEAD} if config.tie_word_embeddings else set())
        leave_unread(model, read)
    else:
        state = {name: read(name) for name in recipes}
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        assert not unexpected, unexpected
        assert set(missing) <= ({HEAD} if config.tie_word_embeddings else set()), missing
    model.tie_weights()
    _place_buffers(model, device)
    model.train(False)
    return model


def _place_buffers(model: torch.nn.Module, device: torch.device) -> None:
    """Put the buffers, which were in no file, where the weights are, or will be."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def placed(tensor: Tensor, dtype: torch.dtype | Literal["auto"], device: torch.device) -> Tensor:
    """A copy of a tensor of a file, in the type and the place that are asked for.

    Args:
        tensor: What the file holds.
        dtype: Type of floating-point tensors; ``"auto"`` keeps it.
        device: Where it goes.
    """
    target = dtype if dtype != "auto" and tensor.is_floating_point() else tensor.dtype
    # A copy even where nothing changes: the tensor is a window on its file, and a checkpoint
    # that is replaced later must not change, or end, a model that is running.
    return tensor.to(device=device, dtype=target, copy=True)


def _config_json(model: CascadeVLForConditionalGeneration) -> Json:
    config: Json = model.config.to_dict()
    text = config["text_config"]
    rope = dict(text.get("rope_parameters") or {})
    if "rope_theta" in rope:  # what transformers before 5 reads; 5 reads rope_parameters
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    obstacle = model.config.plain_transformers_obstacle
    architecture = (
        "InternVLForConditionalGeneration"
        if obstacle is None
        else CascadeVLForConditionalGeneration.__name__
    )
    config |= {
        "architectures": [architecture],
        "model_type": "internvl",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        OBSTACLE_KEY: obstacle,
    }
    return {key: value for key, value in config.items() if key != OBSTACLE_KEY or obstacle}
