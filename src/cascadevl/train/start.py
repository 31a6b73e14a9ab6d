"""The model a run starts from: made or opened, and brought into the state that the run wants."""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cascadevl.data.conversation import IMAGE_CONTEXT
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import TilingConfig
from cascadevl.errors import ConfigError
from cascadevl.model.adapter_files import is_adapter_folder
from cascadevl.model.drop_path import DropPath
from cascadevl.model.loading import find, load
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.presets import initialise, micro_config, nano_config
from cascadevl.model.sharding import shard
from cascadevl.model.unread import fill
from cascadevl.train.config import ModelConfig
from cascadevl.train.lora import LoraConfig, add_adapters
from cascadevl.train.optim import set_precision


def from_scratch(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None, *, seed: int
) -> tuple[CascadeVLForConditionalGeneration, CascadeVLProcessor]:
    """A preset with random weights, and its processor.

    Args:
        config: Names the preset, and the folder of its tokenizer.
        tokenizer: Instead of the one in the folder.
        seed: Seed of the weights.

    Raises:
        ConfigError: If there is no tokenizer.
    """
    if tokenizer is None:
        if config.tokenizer is None:
            raise ConfigError(
                f"preset {config.preset!r} has no tokenizer; name its folder with "
                "--model.tokenizer, or start from a model with --model.path"
            )
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    shape = {"nano": nano_config, "micro": micro_config}[config.preset or "nano"](
        len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
    )
    model = CascadeVLForConditionalGeneration(shape)
    initialise(model, seed)
    tiling = TilingConfig(
        tile_px=shape.tile_px,
        min_tiles=shape.min_tiles,
        max_tiles=shape.max_tiles,
        thumbnail=shape.use_thumbnail,
    )
    processor = CascadeVLProcessor(
        tokenizer,
        template=shape.template,
        system_message=shape.system_message,
        tiling=tiling,
        tokens_per_tile=shape.tokens_per_tile,
    )
    return model, processor


def start_from(config: ModelConfig) -> tuple[CascadeVLForConditionalGeneration, CascadeVLProcessor]:
    """The model to go on with, and its processor.

    Raises:
        ConfigError: If it is an adapter.
        CheckpointError: If it cannot be opened.
    """
    assert config.path is not None, "the recipe checked it"
    if is_adapter_folder(find(config.path)):
        raise ConfigError(
            f"model.path is {config.path!r}, an adapter; training starts from a model: merge it "
            f"first (cascadevl merge {config.path} --out DIR), or name the merged model beside it"
        )
    # Of a model that is to be divided nobody needs to hold the whole.
    return load(config.path, dtype=config.dtype, lazily=config.shard is not None)


def make_trainable(
    model: CascadeVLForConditionalGeneration,
    config: ModelConfig,
    accelerator: Accelerator,
    *,
    lora: LoraConfig | None = None,
    seed: int = 0,
) -> None:
    """Bring a model into the state a run wants.

    That is: precision, drop path, frozen parts, adapters, checkpointing, device; and each process
    keeps its part alone, if the model is to be divided.

    Args:
        model: The model; changed in place.
        config: What the run wants.
        accelerator: Its device.
        lora: Adapters to train instead of weights.
        seed: Of the adapters' random values.

    Raises:
        ConfigError: If the adapters do not fit the model, or there is nothing to adapt; if there
            is nobody to divide the model among.
    """
    set_precision(model, config.precision)
    if config.drop_path is not None and config.drop_path != model.config.drop_path_rate:
        model.model.drop_path.paused += 1  # for good: another one takes its place
        model.model.drop_path = DropPath(model.model.vision_tower.encoder.layer, config.drop_path)
        model.config.drop_path_rate = config.drop_path
    model.freeze(
        vision="vision" in config.frozen,
        projector="projector" in config.frozen,
        language="language" in config.frozen,
    )
    if lora is not None:
        if config.preset is not None:
            raise ConfigError(
                f"LoRA adapts a trained model, and preset {config.preset!r} starts from random "
                "weights; name a model with --model DIR, or leave --lora out"
            )
        fill(model)
        add_adapters(model, lora, frozen=config.frozen, seed=seed)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if config.shard is None:
        nn.Module.to(model, accelerator.device)
    else:
        shard(model, config.shard, accelerator.device, dtype=config.dtype)
    model.train()
