"""What each tensor is called in the three released layouts, and how one is made of another.

``github`` is the format of the OpenGVLab repositories, ``hf_old`` that of the -HF repositories
(transformers up to 4.51, and what transformers 5 still writes), ``hf`` that of transformers 4.52
and later, which is also ours. Everything here works on names and on tensors as files hold them,
one tensor an expert, and never on a module; ``hf`` is the hub through which all other pairs go.
A `Recipe` says how a tensor is made, so the same table serves real tensors and, on torch's
``meta`` device, the check of shapes before anything is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from cascadevl.model.internlm import FusedAttention, join_wqkv, split_wqkv

Layout: TypeAlias = Literal["github", "hf_old", "hf"]
Reader: TypeAlias = Callable[[str], Tensor]

_VISION, _PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
_GITHUB_LAYER, _LAYER = "vision_model.encoder.layers.*", f"{_VISION}.encoder.layer.*"

# Pairs of templates (GitHub, hf): "*" stands for a number, "**" for the rest of the name.
_VISION_NAMES = (
    ("vision_model.embeddings.class_embedding", f"{_VISION}.embeddings.cls_token"),
    (
        "vision_model.embeddings.patch_embedding.**",
        f"{_VISION}.embeddings.patch_embeddings.projection.**",
    ),
    ("vision_model.embeddings.position_embedding", f"{_VISION}.embeddings.position_embeddings"),
    (f"{_GITHUB_LAYER}.attn.proj.**", f"{_LAYER}.attention.projection_layer.**"),
    (f"{_GITHUB_LAYER}.attn.q_norm.**", f"{_LAYER}.attention.q_norm.**"),
    (f"{_GITHUB_LAYER}.attn.k_norm.**", f"{_LAYER}.attention.k_norm.**"),
    (f"{_GITHUB_LAYER}.mlp.**", f"{_LAYER}.mlp.**"),
    (f"{_GITHUB_LAYER}.norm1.**", f"{_LAYER}.layernorm_before.**"),
    (f"{_GITHUB_LAYER}.norm2.**", f"{_LAYER}.layernorm_after.**"),
    (f"{_GITHUB_LAYER}.ls1", f"{_LAYER}.lambda_1"),
    (f"{_GITHUB_LAYER}.ls2", f"{_LAYER}.lambda_2"),
    ("mlp1.0.**", f"{_PROJECTOR}.layer_norm.**"),
    ("mlp1.1.**", f"{_PROJECTOR}.linear_1.**"),
    ("mlp1.3.**", f"{_PROJECTOR}.linear_2.**"),
)
_SECOND, _ROUTER = "model.compressed_projector", "model.router"
_FLASH_NAMES = (
    *(
        (f"mlp2.{number}.**", f"{_SECOND}.{layer}.**")
        for number, layer in ((0, "layer_norm"), (1, "linear_1"), (4, "linear_2"), (7, "linear_3"))
    ),
    ("pooling_before_gating.query_token", f"{_ROUTER}.query"),
    *(  # layers are numbered from 1 there
        pair
        for number in range(4)
        for pair in (
            (f"pooling_before_gating.norm{number + 1}.**", f"{_ROUTER}.pooling.{number}.norm.**"),
            (f"pooling_before_gating.attn{number + 1}.**", f"{_ROUTER}.pooling.{number}.**"),
            (f"gating.block{number + 1}.0.**", f"{_ROUTER}.blocks.{number}.linear_1.**"),
            (f"gating.block{number + 1}.3.**", f"{_ROUTER}.blocks.{number}.linear_2.**"),
            (f"gating.block{number + 1}.5.**", f"{_ROUTER}.blocks.{number}.norm.**"),
        )
    ),
    ("gating.gate.0.**", f"{_ROUTER}.norm.**"),
    ("gating.gate.1.**", f"{_ROUTER}.gate.**"),
)
FLASH_PREFIXES = (f"{_SECOND}.", f"{_ROUTER}.")
"""How the names of what only a Flash model has begin, in the ``hf`` layout."""

_LANGUAGE_NAMES = (
    ("language_model.model.**", "model.language_model.**"),
    ("language_model.lm_head.**", "lm_head.**"),
)
_BLOCK, _OUR_BLOCK = "language_model.model.layers.*", "model.language_model.layers.*"
_INTERNLM2_NAMES = (
    ("language_model.model.tok_embeddings.**", "model.language_model.embed_tokens.**"),
    ("language_model.model.norm.**", "model.language_model.norm.**"),
    ("language_model.output.**", "lm_head.**"),
    (f"{_BLOCK}.attention.wo.**", f"{_OUR_BLOCK}.self_attn.o_proj.**"),
    (f"{_BLOCK}.feed_forward.w1.**", f"{_OUR_BLOCK}.mlp.gate_proj.**"),
    (f"{_BLOCK}.feed_forward.w3.**", f"{_OUR_BLOCK}.mlp.up_proj.**"),
    (f"{_BLOCK}.feed_forward.w2.**", f"{_OUR_BLOCK}.mlp.down_proj.**"),
    (f"{_BLOCK}.attention_norm.**", f"{_OUR_BLOCK}.input_layernorm.**"),
    (f"{_BLOCK}.ffn_norm.**", f"{_OUR_BLOCK}.post_attention_layernorm.**"),
)
_OLD_NAMES = (
    ("vision_tower.**", "model.vision_tower.**"),
    ("multi_modal_projector.**", "model.multi_modal_projector.**"),
    ("compressed_projector.**", f"{_SECOND}.**"),
    ("router.**", f"{_ROUTER}.**"),
    *_LANGUAGE_NAMES,
)

_QKV = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.attn\.qkv\.(weight|bias)")
_WQKV = re.compile(r"language_model\.model\.layers\.(\d+)\.attention\.wqkv\.(weight|bias)")
_VISION_PART = re.compile(
    r"model\.vision_tower\.encoder\.layer\.(\d+)\.attention\.([qkv])_proj\.(weight|bias)"
)
_LANGUAGE_PART = re.compile(
    r"model\.language_model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one tensor of a layout is made from tensors of another.

    Attributes:
        sources: The tensors it is made from.
        make: Makes it; takes them in that order.
    """

    sources: tuple[str, ...]
    make: Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class NameMap:
    """The outcome of translating a checkpoint's names.

    Attributes:
        recipes: How each tensor of the target is made.
        unknown: Names of the source to which no rule applies.
    """

    recipes: dict[str, Recipe]
    unknown: tuple[str, ...]


def detect_layout(names: Iterable[str]) -> Layout | None:
    """Which layout these names belong to, or None if it is none of the three."""
    prefixes = {"vision_model.": "github", "vision_tower.": "hf_old", "model.vision_tower.": "hf"}
    found = {
        layout for name in names for prefix, layout in prefixes.items() if name.startswith(prefix)
    }
    layouts: tuple[Layout, ...] = ("github", "hf_old", "hf")
    return next((layout for layout in layouts if found == {layout}), None)


def to_hub(names: Iterable[str], layout: Layout, fused: FusedAttention | None = None) -> NameMap:
    """Recipes for the ``hf`` tensors that a checkpoint of another layout holds.

    Args:
        names: Names in the checkpoint.
        layout: Its layout.
        fused: Set for a ``github`` checkpoint with an InternLM2 language model.
    """
    recipes: dict[str, Recipe] = {}
    unknown = []
    for name in names:
        found = _split_attention(name, fused) if layout == "github" else {}
        renamed = None if found else _rename(name, _table(layout, fused), forward=True)
        if renamed is not None:
            found = {renamed: Recipe((name,), _same)}
        if not found:
            unknown.append(name)
        recipes.update(found)
    return NameMap(recipes, tuple(unknown))


def from_hub(names: Iterable[str], layout: Layout, fused: FusedAttention | None = None) -> NameMap:
    """Recipes for the tensors of a layout from the ``hf`` tensors with these names.

    Args:
        names: Names in the ``hf`` layout.
        layout: The layout wanted.
        fused: Set for a ``github`` checkpoint with an InternLM2 language model.
    """
    recipes: dict[str, Recipe] = {}
    unknown = []
    for name in names:
        joined = _join_attention(name, fused) if layout == "github" else None
        if joined is not None:
            recipes[joined[0]] = joined[1]
            continue
        renamed = _rename(name, _table(layout, fused), forward=False)
        if renamed is None:
            unknown.append(name)
        else:
            recipes[renamed] = Recipe((name,), _same)
    return NameMap(recipes, tuple(unknown))


def through(reader: Reader, recipes: Mapping[str, Recipe]) -> Reader:
    """A reader of the tensors that the recipes make, on top of a reader of their sources."""

    def read(name: str) -> Tensor:
        recipe = recipes[name]
        return recipe.make(*(reader(source) for source in recipe.sources))

    return read


def fuse_experts(names: Iterable[str]) -> dict[str, Recipe]:
    """Recipes for the module's tensors from the file's: experts stacked, the rest as it is.

    transformers 5 holds the experts of a Qwen3-MoE layer in two tensors, files hold three for
    each expert. GPT-OSS is fused in files as well.
    """
    experts: dict[str, dict[int, set[str]]] = {}
    recipes: dict[str, Recipe] = {}
    for name in names:
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if match is None:
            recipes[name] = Recipe((name,), _same)
        else:
            experts.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(match[3])
    for prefix, parts in experts.items():
        numbers = sorted(parts)
        gates = [f"{prefix}.{n}.{part}_proj.weight" for n in numbers for part in ("gate", "up")]
        downs = [f"{prefix}.{number}.down_proj.weight" for number in numbers]
        recipes[f"{prefix}.gate_up_proj"] = Recipe(tuple(gates), _stack_pairs)
        recipes[f"{prefix}.down_proj"] = Recipe(tuple(downs), _stack)
    return recipes


def split_experts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Recipe]:
    """Recipes for the file's tensors from the module's: the inverse of `fuse_experts`.

    Args:
        shapes: Shape of every tensor of the module. Experts with biases (GPT-OSS) stay fused.
    """
    recipes: dict[str, Recipe] = {}
    for name, shape in shapes.items():
        prefix, _, part = name.rpartition(".")
        is_fused = prefix.endswith(".experts") and part in ("gate_up_proj", "down_proj")
        if not is_fused or f"{name}_bias" in shapes:
            recipes[name] = Recipe((name,), _same)
            continue
        for number in range(shape[0]):
            start = f"{prefix}.{number}"
            if part == "down_proj":
                recipes[f"{start}.down_proj.weight"] = Recipe(
                    (name,), partial(_expert, number=number, half=None)
                )
                continue
            for half, kind in enumerate(("gate", "up")):
                recipes[f"{start}.{kind}_proj.weight"] = Recipe(
                    (name,), partial(_expert, number=number, half=half)
                )
    return recipes


def _table(layout: Layout, fused: FusedAttention | None) -> tuple[tuple[str, str], ...]:
    if layout == "hf":
        return (("model.**", "model.**"), ("lm_head.**", "lm_head.**"))
    if layout == "hf_old":
        return _OLD_NAMES
    return (*_VISION_NAMES, *_FLASH_NAMES, *(_INTERNLM2_NAMES if fused else _LANGUAGE_NAMES))


def _rename(name: str, table: tuple[tuple[str, str], ...], *, forward: bool) -> str | None:
    for github, hub in table:
        source, target = (github, hub) if forward else (hub, github)
        match = _pattern(source).fullmatch(name)
        if match is not None:
            values = iter(match.groups())
            return re.sub(r"\*\*?", lambda _: next(values), target)  # noqa: B023 (used at once)
    return None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\*\*", r"(.+)").replace(r"\*", r"(\d+)"))


def _split_attention(name: str, fused: FusedAttention | None) -> dict[str, Recipe]:
    if match := _QKV.fullmatch(name):
        start = f"{_VISION}.encoder.layer.{match[1]}.attention"
        return {
            f"{start}.{part}_proj.{match[2]}": Recipe((name,), partial(_third, number=number))
            for number, part in enumerate("qkv")
        }
    if fused is not None and (match := _WQKV.fullmatch(name)):
        start = f"model.language_model.layers.{match[1]}.self_attn"
        return {
            f"{start}.{part}_proj.{match[2]}": Recipe(
                (name,), partial(split_wqkv, part=part, fused=fused)
            )
            for part in ("q", "k", "v")
        }
    return {}


def _join_attention(name: str, fused: FusedAttention | None) -> tuple[str, Recipe] | None:
    if match := _VISION_PART.fullmatch(name):
        start = f"{_VISION}.encoder.layer.{match[1]}.attention"
        sources = tuple(f"{start}.{part}_proj.{match[3]}" for part in "qkv")
        return f"vision_model.encoder.layers.{match[1]}.attn.qkv.{match[3]}", Recipe(sources, _join)
    if fused is not None and (match := _LANGUAGE_PART.fullmatch(name)):
        start = f"model.language_model.layers.{match[1]}.self_attn"
        sources = tuple(f"{start}.{part}_proj.{match[3]}" for part in "qkv")
        target = f"language_model.model.layers.{match[1]}.attention.wqkv.{match[3]}"
        return target, Recipe(sources, partial(join_wqkv, fused=fused))
    return None


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _third(qkv: Tensor, *, number: int) -> Tensor:
    # A copy, because a view would keep the two other thirds in memory.
    return qkv.chunk(3)[number].clone()


def _join(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _stack(*experts: Tensor) -> Tensor:
    return torch.stack(experts)


def _stack_pairs(*gates_and_ups: Tensor) -> Tensor:
    gates, ups = gates_and_ups[::2], gates_and_ups[1::2]
    rows, columns = gates[0].shape
    fused = gates[0].new_empty(len(gates), 2 * rows, columns)
    for number, (gate, up) in enumerate(zip(gates, ups, strict=True)):
        fused[number, :rows], fused[number, rows:] = gate, up
    return fused


def _expert(stacked: Tensor, *, number: int, half: int | None) -> Tensor:
    expert = stacked[number]
    return (expert if half is None else expert.chunk(2)[half]).clone()
