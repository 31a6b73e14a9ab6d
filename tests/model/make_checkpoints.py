"""Small random checkpoints in the formats of the released ones, written out by hand.

Names, shapes and the relation between the formats stand here a second time, as plain loops, so
that the package's name tables are held against something that shares no code with them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast

from cascadevl.data.tokenizer import build_tokenizer

FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "gpt_oss", "internlm2", "internlm3", "llama")
VISIONS = ("300M", "6B")
BODIES = (("qwen2", "6B"), *zip(FAMILIES, ("300M", "6B") * 4, strict=False))
"""Every family with one vision encoder, one with both: the two halves do not meet in names."""

WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 32, 2, 4, 2, 8, 48, 320
EXPERTS, EXPERT_MLP = 4, 16
VIT_WIDTH, VIT_LAYERS, VIT_HEADS, VIT_MLP, TILE_PX, PATCH_PX = 16, 2, 2, 32, 56, 14
TOKENS_PER_TILE = (TILE_PX // PATCH_PX // 2) ** 2

Shapes = Iterator[tuple[str, tuple[int, ...]]]


HARMONY_TOKENS = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>")


@cache
def tokenizer(family: str = "qwen3") -> PreTrainedTokenizerFast:
    texts = ["What is written on the door?", "The door is red.", "user system assistant"]
    made = build_tokenizer(texts, VOCAB - len(HARMONY_TOKENS))
    if family == "gpt_oss":
        made.add_special_tokens({"additional_special_tokens": list(HARMONY_TOKENS)})
    return made


def vision_shapes(vision: str) -> Shapes:
    width, positions = VIT_WIDTH, (TILE_PX // PATCH_PX) ** 2 + 1
    start = "vision_model.embeddings"
    yield f"{start}.class_embedding", (1, 1, width)
    yield f"{start}.patch_embedding.weight", (width, 3, PATCH_PX, PATCH_PX)
    yield f"{start}.patch_embedding.bias", (width,)
    yield f"{start}.position_embedding", (1, positions, width)
    for layer in range(VIT_LAYERS):
        start = f"vision_model.encoder.layers.{layer}"
        yield f"{start}.attn.qkv.weight", (3 * width, width)
        yield f"{start}.attn.proj.weight", (width, width)
        yield f"{start}.attn.proj.bias", (width,)
        yield f"{start}.mlp.fc1.weight", (VIT_MLP, width)
        yield f"{start}.mlp.fc1.bias", (VIT_MLP,)
        yield f"{start}.mlp.fc2.weight", (width, VIT_MLP)
        yield f"{start}.mlp.fc2.bias", (width,)
        for name in ("norm1.weight", "norm2.weight", "ls1", "ls2"):
            yield f"{start}.{name}", (width,)
        if vision == "300M":
            yield f"{start}.attn.qkv.bias", (3 * width,)
            yield f"{start}.norm1.bias", (width,)
            yield f"{start}.norm2.bias", (width,)
        else:
            yield f"{start}.attn.q_norm.weight", (width,)
            yield f"{start}.attn.k_norm.weight", (width,)
    yield "mlp1.0.weight", (4 * width,)
    yield "mlp1.0.bias", (4 * width,)
    yield "mlp1.1.weight", (WIDTH, 4 * width)
    yield "mlp1.1.bias", (WIDTH,)
    yield "mlp1.3.weight", (WIDTH, WIDTH)
    yield "mlp1.3.bias", (WIDTH,)


def internlm2_shapes() -> Shapes:
    yield "language_model.model.tok_embeddings.weight", (VOCAB, WIDTH)
    for layer in range(LAYERS):
        start = f"language_model.model.layers.{layer}"
        yield f"{start}.attention.wqkv.weight", ((HEADS + 2 * KV_HEADS) * HEAD_DIM, WIDTH)
        yield f"{start}.attention.wo.weight", (WIDTH, HEADS * HEAD_DIM)
        yield f"{start}.feed_forward.w1.weight", (MLP, WIDTH)
        yield f"{start}.feed_forward.w3.weight", (MLP, WIDTH)
        yield f"{start}.feed_forward.w2.weight", (WIDTH, MLP)
        yield f"{start}.attention_norm.weight", (WIDTH,)
        yield f"{start}.ffn_norm.weight", (WIDTH,)
    yield "language_model.model.norm.weight", (WIDTH,)


def language_shapes(family: str) -> Shapes:
    yield "language_model.model.embed_tokens.weight", (VOCAB, WIDTH)
    for layer in range(LAYERS):
        start = f"language_model.model.layers.{layer}"
        yield f"{start}.input_layernorm.weight", (WIDTH,)
        yield f"{start}.post_attention_layernorm.weight", (WIDTH,)
        yield from _attention_shapes(f"{start}.self_attn", family)
        yield from _mlp_shapes(f"{start}.mlp", family)
    yield "language_model.model.norm.weight", (WIDTH,)


def _attention_shapes(start: str, family: str) -> Shapes:
    for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        yield f"{start}.{part}_proj.weight", (heads * HEAD_DIM, WIDTH)
        if family in ("qwen2", "gpt_oss"):
            yield f"{start}.{part}_proj.bias", (heads * HEAD_DIM,)
    yield f"{start}.o_proj.weight", (WIDTH, HEADS * HEAD_DIM)
    if family == "gpt_oss":
        yield f"{start}.o_proj.bias", (WIDTH,)
        yield f"{start}.sinks", (HEADS,)
    if family in ("qwen3", "qwen3_moe"):
        yield f"{start}.q_norm.weight", (HEAD_DIM,)
        yield f"{start}.k_norm.weight", (HEAD_DIM,)


def _mlp_shapes(start: str, family: str) -> Shapes:
    if family == "gpt_oss":
        yield f"{start}.router.weight", (EXPERTS, WIDTH)
        yield f"{start}.router.bias", (EXPERTS,)
        yield f"{start}.experts.gate_up_proj", (EXPERTS, WIDTH, 2 * MLP)
        yield f"{start}.experts.gate_up_proj_bias", (EXPERTS, 2 * MLP)
        yield f"{start}.experts.down_proj", (EXPERTS, MLP, WIDTH)
        yield f"{start}.experts.down_proj_bias", (EXPERTS, WIDTH)
        return
    if family == "qwen3_moe":
        yield f"{start}.gate.weight", (EXPERTS, WIDTH)
    experts = range(EXPERTS) if family == "qwen3_moe" else [None]
    for expert in experts:
        place = start if expert is None else f"{start}.experts.{expert}"
        size = MLP if expert is None else EXPERT_MLP
        yield f"{place}.gate_proj.weight", (size, WIDTH)
        yield f"{place}.up_proj.weight", (size, WIDTH)
        yield f"{place}.down_proj.weight", (WIDTH, size)


def github_tensors(
    family: str, vision: str = "300M", *, tied: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """A checkpoint's tensors in the GitHub format."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(vision_shapes(vision))
    shapes |= dict(internlm2_shapes() if family == "internlm2" else language_shapes(family))
    if not tied:
        head = "output" if family == "internlm2" else "lm_head"
        shapes[f"language_model.{head}.weight"] = (VOCAB, WIDTH)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()
    }
    return {
        name: tensor + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for name, tensor in tensors.items()
    }


def hf_tensors(github: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in the layout of transformers 4.52 and later, one tensor an expert."""
    result: dict[str, Tensor] = {}
    for name, tensor in github.items():
        result |= _vision_by_hand(name, tensor) or _language_by_hand(name, tensor)
    return result


def old_hf_tensors(hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in the layout of transformers up to 4.51."""
    result = {}
    for name, tensor in hf.items():
        if name.startswith("model.language_model."):
            name = "language_model.model." + name[len("model.language_model.") :]
        elif name.startswith("lm_head."):
            name = "language_model." + name
        else:
            name = name[len("model.") :]
        result[name] = tensor
    return result


def module_tensors(hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a module of transformers 5 holds: the experts of Qwen3-MoE stacked."""
    result = {name: tensor for name, tensor in hf.items() if not re.search(r"experts\.\d", name)}
    for layer in range(LAYERS):
        start = f"model.language_model.layers.{layer}.mlp.experts"
        if f"{start}.0.gate_proj.weight" not in hf:
            continue
        pairs, downs = [], []
        for expert in range(EXPERTS):
            gate = hf[f"{start}.{expert}.gate_proj.weight"]
            up = hf[f"{start}.{expert}.up_proj.weight"]
            pairs.append(torch.cat([gate, up]))
            downs.append(hf[f"{start}.{expert}.down_proj.weight"])
        result[f"{start}.gate_up_proj"] = torch.stack(pairs)
        result[f"{start}.down_proj"] = torch.stack(downs)
    return result


def _vision_by_hand(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name.startswith("mlp1."):
        _, number, kind = name.split(".")
        module = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}[number]
        return {f"model.multi_modal_projector.{module}.{kind}": tensor}
    if not name.startswith("vision_model."):
        return {}
    if ".attn.qkv." in name:
        start, kind = name.replace(
            "vision_model.encoder.layers", "model.vision_tower.encoder.layer"
        ).split(".attn.qkv.")
        size = VIT_WIDTH
        return {
            f"{start}.attention.q_proj.{kind}": tensor[:size],
            f"{start}.attention.k_proj.{kind}": tensor[size : 2 * size],
            f"{start}.attention.v_proj.{kind}": tensor[2 * size :],
        }
    for old, new in (
        ("vision_model.encoder.layers", "model.vision_tower.encoder.layer"),
        ("vision_model.embeddings.class_embedding", "model.vision_tower.embeddings.cls_token"),
        (
            "vision_model.embeddings.patch_embedding",
            "model.vision_tower.embeddings.patch_embeddings.projection",
        ),
        (
            "vision_model.embeddings.position_embedding",
            "model.vision_tower.embeddings.position_embeddings",
        ),
        ("attn.proj", "attention.projection_layer"),
        ("attn.q_norm", "attention.q_norm"),
        ("attn.k_norm", "attention.k_norm"),
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
        (".ls1", ".lambda_1"),
        (".ls2", ".lambda_2"),
    ):
        name = name.replace(old, new)
    return {name: tensor}


def _language_by_hand(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name.endswith("wqkv.weight"):
        start = name.replace("language_model.model", "model.language_model").split(".attention.")[0]
        rows: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
        groups = HEADS // KV_HEADS
        row = 0
        for _ in range(KV_HEADS):
            for place in range(groups + 2):
                part = "q" if place < groups else "k" if place == groups else "v"
                for _ in range(HEAD_DIM):
                    rows[part].append(tensor[row])
                    row += 1
        return {
            f"{start}.self_attn.{part}_proj.weight": torch.stack(rows[part])
            for part in ("q", "k", "v")
        }
    if name.startswith(("language_model.output", "language_model.lm_head")):
        return {"lm_head.weight": tensor}
    for old, new in (
        ("language_model.model", "model.language_model"),
        ("tok_embeddings", "embed_tokens"),
        ("attention.wo", "self_attn.o_proj"),
        ("feed_forward.w1", "mlp.gate_proj"),
        ("feed_forward.w2", "mlp.down_proj"),
        ("feed_forward.w3", "mlp.up_proj"),
        ("attention_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
    ):
        name = name.replace(old, new)
    return {name: tensor}


def llm_config(family: str) -> dict[str, Any]:
    """The ``llm_config`` of a GitHub config.json."""
    architectures = {
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "qwen3_moe": "Qwen3MoeForCausalLM",
        "gpt_oss": "GptOssForCausalLM",
        "internlm2": "InternLM2ForCausalLM",
        "internlm3": "InternLM3ForCausalLM",
        "llama": "LlamaForCausalLM",
    }
    config: dict[str, Any] = {
        "_name_or_path": "somewhere/on/their/disk",
        "architectures": [architectures[family]],
        "model_type": family,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": MLP,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "num_beams": 1,
        "temperature": 1.0,
        "torch_dtype": "float32",
        "use_cache": True,
        "eos_token_id": 0,
    }
    if family in ("qwen2", "internlm2"):
        config["rope_scaling"] = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
    if family != "qwen2":
        config["head_dim"] = HEAD_DIM
    if family == "qwen3_moe":
        config |= {"num_experts": EXPERTS, "num_experts_per_tok": 2}
        config |= {"moe_intermediate_size": EXPERT_MLP, "norm_topk_prob": True}
    if family == "gpt_oss":
        config |= {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "sliding_window": 8}
        config["layer_types"] = ["sliding_attention", "full_attention"]
        config["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
        }
    if family in ("internlm2", "internlm3"):
        config |= {
            "bias": False,
            "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        }
    if family == "internlm3":
        config["qkv_bias"] = False
    return config


def github_config(family: str, vision: str = "300M", **more: Any) -> dict[str, Any]:
    """A GitHub config.json."""
    is_small = vision == "300M"
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": TILE_PX,
        "llm_config": llm_config(family),
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl3_5_gpt_oss" if family == "gpt_oss" else "internvl2_5",
        "torch_dtype": "float32",
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "drop_path_rate": 0.1,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": VIT_WIDTH,
            "image_size": TILE_PX,
            "initializer_factor": 0.1,
            "initializer_range": 1e-10,
            "intermediate_size": VIT_MLP,
            "layer_norm_eps": 1e-6,
            "model_type": "intern_vit_6b",
            "norm_type": "layer_norm" if is_small else "rms_norm",
            "num_attention_heads": VIT_HEADS,
            "num_channels": 3,
            "num_hidden_layers": VIT_LAYERS,
            "patch_size": PATCH_PX,
            "qk_normalization": not is_small,
            "qkv_bias": is_small,
            "use_flash_attn": True,
        },
        **more,
    }


def hf_config(family: str, vision: str = "300M", **more: Any) -> dict[str, Any]:
    """An -HF config.json as released: no template, no tiling, the head's tie not said on top."""
    github = github_config(family, vision)
    text = {
        key: value
        for key, value in github["llm_config"].items()
        if key not in ("_name_or_path", "auto_map", "num_beams", "temperature")
    }
    if family == "internlm2":
        text |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        text.pop("bias")
    vit = github["vision_config"]
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 0.5,
        "image_seq_length": TOKENS_PER_TILE,
        "image_token_id": tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>"),
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": text,
        "torch_dtype": "float32",
        "vision_config": {
            "attention_bias": vit["qkv_bias"],
            "hidden_size": VIT_WIDTH,
            "image_size": [TILE_PX, TILE_PX],
            "intermediate_size": VIT_MLP,
            "layer_norm_eps": 1e-6,
            "layer_scale_init_value": 0.1,
            "model_type": "internvl_vision",
            "norm_type": vit["norm_type"],
            "num_attention_heads": VIT_HEADS,
            "num_hidden_layers": VIT_LAYERS,
            "patch_size": [PATCH_PX, PATCH_PX],
            "use_qk_norm": vit["qk_normalization"],
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        **more,
    }


def write(
    path: Path, tensors: dict[str, Tensor], config: dict[str, Any], *, num_files: int = 1
) -> Path:
    """Write a checkpoint folder; a GitHub one has only the tokenizer's own file beside."""
    path.mkdir(parents=True)
    names = list(tensors)
    weight_map = {}
    for number in range(num_files):
        several = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        file_name = "model.safetensors" if num_files == 1 else several
        shard = {name: tensors[name].contiguous() for name in names[number::num_files]}
        save_file(shard, path / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    if num_files > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(config, indent=2))
    language = config.get("llm_config") or config["text_config"]
    tokenizer(language["model_type"]).save_pretrained(path)
    return path


def write_github(
    path: Path, family: str, vision: str = "300M", *, tied: bool = False, num_files: int = 1
) -> Path:
    """Write a checkpoint in the GitHub format."""
    tensors = github_tensors(family, vision, tied=tied)
    return write(path, tensors, github_config(family, vision), num_files=num_files)


def reference_model(
    family: str, vision: str = "300M", *, tied: bool = False
) -> InternVLForConditionalGeneration:
    """Plain transformers' model with the same weights, filled by hand."""
    config = hf_config(family, vision, tie_word_embeddings=tied)
    model = InternVLForConditionalGeneration(InternVLConfig(**config))
    hf = hf_tensors(github_tensors(family, vision, tied=tied))
    missing, unexpected = model.load_state_dict(module_tensors(hf), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if tied else [])
    model.tie_weights()
    return model.eval()
