"""config.json of the GitHub format as that of the -HF format, and back.

Both functions take and give plain JSON values, so that a conversion never depends on what some
version of transformers makes of a configuration. What one format cannot say is not lost: the
original stands in the result under ``cascadevl_origin``, and going back gives it out again
unless the configuration was changed in between.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, TypeAlias

from transformers import GenerationConfig

from cascadevl.errors import CheckpointError
from cascadevl.model.configuration import FLASH_OBSTACLE

Json: TypeAlias = dict[str, Any]

ORIGIN_KEY = "cascadevl_origin"
"""Where a converted config.json keeps the configuration it was made from."""

OBSTACLE_KEY = "cascadevl_requires"
"""In a config.json: why plain transformers would compute something else with these weights."""

OUR_ARCHITECTURE = "CascadeVLForConditionalGeneration"
"""What a config.json names where plain transformers would compute something else."""

INTERNLM2_ARCHITECTURE = "InternLM2ForCausalLM"

_ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "llama": "LlamaForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
}
_VISION_KEYS = {  # GitHub -> hf, where the value stays
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "hidden_act": "hidden_act",
    "norm_type": "norm_type",
    "layer_norm_eps": "layer_norm_eps",
    "num_channels": "num_channels",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "initializer_range": "initializer_range",
    "initializer_factor": "layer_scale_init_value",
    "attention_dropout": "attention_dropout",
    "dropout": "hidden_dropout_prob",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
}
# What the released configuration class assumes where a config.json is silent.
_VISION_DEFAULTS: Json = {
    "qkv_bias": False,
    "qk_normalization": True,
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "num_channels": 3,
    "patch_size": 14,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "initializer_factor": 0.1,
}
# Keys that every old configuration file repeats although they say nothing about the model.
_BOILERPLATE = (
    {"_name_or_path", "_attn_implementation_autoset", "attn_implementation", "auto_map"}
    | {"add_cross_attention", "chunk_size_feed_forward", "cross_attention_hidden_size", "id2label"}
    | {"finetuning_task", "is_decoder", "is_encoder_decoder", "label2id", "output_attentions"}
    | {"output_hidden_states", "prefix", "problem_type", "pruned_heads", "return_dict"}
    | {"task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class"}
    | {"torchscript", "transformers_version", "use_bfloat16", "use_flash_attn"}
)
_FLASH_THRESHOLDS = ("flash_relative_threshold", "flash_absolute_threshold")
_OWN_FLASH_KEYS: Json = {  # what released code has no key for, and what it does
    "flash_layers": "released",
    "flash_heads": 16,
    "flash_downsample_ratio": 0.25,
}
_GENERATION_KEYS_OF_MODELS = {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache"}


def read_json(file: Path) -> Json:
    """The object a JSON file holds.

    Raises:
        CheckpointError: If the file is missing, is not JSON, or holds something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; is this the folder of a checkpoint?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: holds a {type(values).__name__}, not a JSON object")
    return values


def write_json(file: Path, values: Json) -> None:
    """Write a JSON object as the released repositories do: indented by two, UTF-8."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")


def is_github(config: Json) -> bool:
    """Whether a config.json is of the GitHub format."""
    return "llm_config" in config or config.get("model_type") == "internvl_chat"


def hf_config(config: Json, *, image_token_id: int, tied: bool) -> Json:
    """The -HF configuration that says what a GitHub one says, its origin included.

    Args:
        config: The content of a GitHub config.json.
        image_token_id: Id of ``<IMG_CONTEXT>``, which only the tokenizer knows.
        tied: Whether the output head is the token embedding; only the tensors tell, because
            released configurations contradict them.

    Raises:
        CheckpointError: If a part is missing or the language model is of an unknown family.
    """
    origin = config.get(ORIGIN_KEY)
    stripped = {key: value for key, value in config.items() if key != ORIGIN_KEY}
    if origin is not None and _github_without_origin(origin, tied) == stripped:
        restored: Json = copy.deepcopy(origin)
        return restored
    merged = _merge(origin or {}, _hf_without_origin(stripped, image_token_id, tied))
    return {**merged, ORIGIN_KEY: copy.deepcopy(stripped)}


def github_config(config: Json, *, tied: bool) -> Json:
    """The GitHub configuration that says what an -HF one says, its origin included.

    Args:
        config: The content of an -HF config.json.
        tied: Whether the output head is the token embedding; only the tensors tell.

    Raises:
        CheckpointError: If a part is missing or the language model is of an unknown family.
    """
    origin = config.get(ORIGIN_KEY)
    stripped = {key: value for key, value in config.items() if key != ORIGIN_KEY}
    token = stripped.get("image_token_id")
    if origin is not None and _hf_without_origin(origin, token, tied) == stripped:
        restored: Json = copy.deepcopy(origin)
        return restored
    fresh = _github_without_origin(stripped, tied)
    if uses_internlm2_names(config):
        llm = fresh["llm_config"]
        llm |= {"model_type": "internlm2", "architectures": [INTERNLM2_ARCHITECTURE]}
        llm["bias"] = llm.pop("attention_bias", False)
    return {**_merge(origin or {}, fresh), ORIGIN_KEY: copy.deepcopy(stripped)}


def uses_internlm2_names(config: Json) -> bool:
    """Whether the GitHub checkpoint of this configuration (of either form) is InternLM2's."""
    github = config if is_github(config) else config.get(ORIGIN_KEY, {})
    language = github.get("llm_config")
    architectures = language.get("architectures") if isinstance(language, dict) else None
    return INTERNLM2_ARCHITECTURE in (architectures or ())


def _hf_without_origin(config: Json, image_token_id: int | None, tied: bool) -> Json:
    for part in ("llm_config", "vision_config"):
        if not isinstance(config.get(part), dict):
            raise CheckpointError(f"config.json has no {part!r}; it is not of the GitHub format")
    vision = {**_VISION_DEFAULTS, **config["vision_config"]}
    tile_px = int(config.get("force_image_size") or vision.get("image_size") or 448)
    vision["image_size"] = tile_px
    text = {**language_part(config["llm_config"]), "tie_word_embeddings": tied}
    ratio = float(config.get("downsample_ratio", 0.5))
    dynamic = bool(config.get("dynamic_image_size", False))
    result: Json = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": image_token_id,
        "image_seq_length": int((tile_px // vision["patch_size"]) ** 2 * ratio**2),
        "downsample_ratio": ratio,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.get("select_layer", -1),
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": tied,
        "text_config": text,
        "vision_config": vision_part(vision),
        "template": config.get("template") or default_template(text),
        "system_message": config.get("system_message"),
        # The released configuration class falls back to v1, not to the v2 of every release.
        "ps_version": config.get("ps_version", "v1"),
        "min_tiles": int(config.get("min_dynamic_patch", 1)) if dynamic else 1,
        "max_tiles": int(config.get("max_dynamic_patch", 6)) if dynamic else 1,
        "use_thumbnail": bool(config.get("use_thumbnail", False)) and dynamic,
        "drop_path_rate": float(vision.get("drop_path_rate", 0.0)),
    }
    if "flash_mode" in config:
        result |= _flash_part(config)
    dtype = config.get("torch_dtype") or config.get("dtype")
    return {**result, "dtype": dtype} if dtype else result


def _flash_part(config: Json) -> Json:
    """What a GitHub configuration says of compressed tiles and their router."""
    known: Json = {key: config[key] for key in _FLASH_THRESHOLDS if key in config}
    known["flash_mode"] = bool(config["flash_mode"])
    if not known["flash_mode"]:
        return known
    missing = [key for key in _FLASH_THRESHOLDS if key not in known]
    if missing:
        raise CheckpointError(
            f"flash_mode is set in config.json, but {' and '.join(missing)} are not: take them "
            f"from the repository, or set flash_mode to false for all tokens of every tile"
        )
    own = {key: config.get(key, released) for key, released in _OWN_FLASH_KEYS.items()}
    return {
        **known,
        **own,
        "architectures": [OUR_ARCHITECTURE],
        OBSTACLE_KEY: FLASH_OBSTACLE,
    }


def vision_part(vision: Json) -> Json:
    """The configuration of a vision tower in the -HF form, from that of the GitHub form.

    Args:
        vision: As its config.json has it; what is left out is as the released class assumes.

    Raises:
        CheckpointError: If it does not say how large a tile is.
    """
    vision = {**_VISION_DEFAULTS, **vision}
    if "image_size" not in vision:
        raise CheckpointError("the vision tower's config.json does not say its 'image_size'")
    sides = ("image_size", "patch_size")
    result = {hf: vision[github] for github, hf in _VISION_KEYS.items() if github in vision}
    result |= {key: [result[key], result[key]] for key in sides}
    return {"model_type": "internvl_vision", "architectures": ["InternVLVisionModel"], **result}


def language_part(llm: Json) -> Json:
    """The configuration of a language model in the -HF form, from its own config.json.

    Raises:
        CheckpointError: If it is of an unknown family.
    """
    generation = set(GenerationConfig().to_dict()) - _GENERATION_KEYS_OF_MODELS
    text = {
        key: copy.deepcopy(value)
        for key, value in llm.items()
        if key not in _BOILERPLATE and key not in generation
    }
    architecture = (llm.get("architectures") or [""])[0]
    if architecture == INTERNLM2_ARCHITECTURE or llm.get("model_type") == "internlm2":
        # The same network as Llama; only the names of its tensors differ.
        text["model_type"] = "llama"
        text["architectures"] = ["LlamaForCausalLM"]
        text["attention_bias"] = bool(text.pop("bias", False))
        text["mlp_bias"] = False
    if text.get("model_type") not in _ARCHITECTURES:
        raise CheckpointError(
            f"language model {architecture or text.get('model_type')!r} is not supported; "
            f"supported: {', '.join(_ARCHITECTURES)} and internlm2"
        )
    return text


def _github_without_origin(config: Json, tied: bool) -> Json:
    text, vision = config.get("text_config"), config.get("vision_config")
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise CheckpointError(
            "config.json has no 'text_config' and 'vision_config'; it is not of the -HF format"
        )
    tile_px, patch_px = _side(vision.get("image_size", 448)), _side(vision.get("patch_size", 14))
    result: Json = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "llm_config": _llm_config(text, tied),
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            **{github: vision[hf] for github, hf in _VISION_KEYS.items() if hf in vision},
            "image_size": tile_px,
            "patch_size": patch_px,
            "drop_path_rate": config.get("drop_path_rate", 0.0),
        },
        "template": config.get("template") or default_template(text),
        "ps_version": config.get("ps_version", "v2"),
        "downsample_ratio": config.get("downsample_ratio", 0.5),
        "select_layer": config.get("vision_feature_layer", -1),
        "force_image_size": tile_px,
        "dynamic_image_size": True,
        "min_dynamic_patch": config.get("min_tiles", 1),
        "max_dynamic_patch": config.get("max_tiles", 12),
        "use_thumbnail": config.get("use_thumbnail", True),
        "pad2square": False,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "tie_word_embeddings": False,
    }
    if config.get("flash_mode"):
        result |= {key: config.get(key) for key in ("flash_mode", *_FLASH_THRESHOLDS)}
        # Without these keys the weights are used as released ones are, by whatever opens them.
        result |= {
            key: config[key]
            for key, released in _OWN_FLASH_KEYS.items()
            if config.get(key, released) != released
        }
    if config.get("system_message") is not None:
        result["system_message"] = config["system_message"]
    dtype = config.get("dtype") or config.get("torch_dtype")
    return {**result, "torch_dtype": dtype} if dtype else result


def _llm_config(text: Json, tied: bool) -> Json:
    family = text.get("model_type", "")
    if family not in _ARCHITECTURES:
        raise CheckpointError(
            f"language model {family!r} is not supported; supported: {', '.join(_ARCHITECTURES)}"
        )
    llm = with_old_rope_keys(text)
    return {**llm, "architectures": [_ARCHITECTURES[family]], "tie_word_embeddings": tied}


def with_old_rope_keys(text: Json) -> Json:
    """A text configuration with ``rope_theta`` and ``rope_scaling``, which every version reads.

    transformers 5 writes both as ``rope_parameters``.
    """
    result = {key: copy.deepcopy(value) for key, value in text.items() if key != "rope_parameters"}
    rope = dict(text.get("rope_parameters") or {})
    if "rope_theta" in rope:
        result["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        result["rope_scaling"] = rope
    return result


def language_config(config: Json, *, tied: bool, dtype: str) -> Json:
    """The config.json of the language half alone, as plain transformers and vLLM read it.

    Args:
        config: The whole model's configuration in the -HF form.
        tied: Whether the output head is the token embedding; only the tensors tell.
        dtype: Type of the weights, for example ``"bfloat16"``.

    Raises:
        CheckpointError: If the language model is of an unknown family.
    """
    text = language_part(config.get("text_config") or {})
    return {
        **{key: value for key, value in text.items() if key not in ("dtype", "torch_dtype")},
        "architectures": [_ARCHITECTURES[text["model_type"]]],
        "tie_word_embeddings": tied,
        "dtype": dtype,
    }


def default_template(text_config: Json) -> str:
    """Name of the conversation template that the released model of this family was trained with."""
    is_gpt_oss = text_config.get("model_type") == "gpt_oss"
    return "internvl3_5_gpt_oss" if is_gpt_oss else "internvl2_5"


def _merge(origin: Json, fresh: Json) -> Json:
    """What is new over what was there before, so that keys only the old one knows stay."""
    merged = {**copy.deepcopy(origin), **fresh}
    for part, value in fresh.items():
        if isinstance(value, dict) and isinstance(origin.get(part), dict):
            merged[part] = {**copy.deepcopy(origin[part]), **value}
    return merged


def _side(size: int | list[int]) -> int:
    return int(size[0]) if isinstance(size, list) else int(size)
