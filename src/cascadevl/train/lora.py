"""LoRA: train small matrices beside frozen weights, for whoever has one GPU or none.

LoRA (arXiv 2106.09685) leaves a weight W as it is and learns W + (alpha / rank) B A, where B and A
have ``rank`` columns and rows. The reports train every weight; the public code offers LoRA to
small labs, and its values are the defaults here. B starts at zero, so the first step starts from
the base model's own answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import peft
import torch
from rapidfuzz import fuzz, process
from torch import nn

from cascadevl.errors import ConfigError
from cascadevl.model.adapters import adapter_parameters, inject
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.train.optim import Module, module_of

TARGETS: Mapping[Module, tuple[str, ...]] = {
    # attn.qkv (one matrix there, three here), attn.proj, mlp.fc1 and mlp.fc2 in the public code
    "vision": ("q_proj", "k_proj", "v_proj", "projection_layer", "fc1", "fc2"),
    # ours: the public code has no adapters here
    "projector": ("linear_1", "linear_2"),
    # the public code's for every family; experts are ours (it has no LoRA for its MoE models)
    "language": (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "gate_up_proj",
    ),
}
"""What is adapted in each part, by the last part of a layer's name, where it is there."""

DROPOUT = 0.05  # public code


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Adapters instead of weights are trained.

    Attributes:
        rank: Columns of B and rows of A; of every expert's, where experts are adapted.
        alpha: The product B A is scaled by ``alpha / rank``; None takes twice the rank.
        dropout: Share of an adapter's inputs set to zero in training. None takes 0.05, or 0 where
            experts are adapted, for which peft has no dropout.
        parts: Which parts of the model get adapters. All others stay as they are, and so do parts
            that ``model.frozen`` names.
        targets: Which layers of these parts, by the end of their names (``q_proj``,
            ``mlp.fc1``, ``experts.down_proj``); empty takes `TARGETS`.
        experts: Adapt the experts of a mixture too. Without, its attention alone is adapted.
        rslora: Scale by ``alpha / sqrt(rank)`` (arXiv 2312.03732), so that high ranks learn.
        dora: Learn the length of every weight's rows beside their direction (DoRA, arXiv
            2402.09353). Not for experts.
        merge: Also write the finished model with its adapters merged in, which opens anywhere.
    """

    rank: int = 16  # use_llm_lora of the public LoRA scripts
    alpha: int | None = None  # public code: 2 * rank
    dropout: float | None = None
    parts: tuple[Module, ...] = ("language",)  # public LoRA scripts: use_backbone_lora is 0
    targets: tuple[str, ...] = ()
    experts: bool = True
    rslora: bool = False
    dora: bool = False
    merge: bool = True

    def __post_init__(self) -> None:
        """Refuse values that adapt nothing."""
        if self.rank < 1 or (self.alpha is not None and self.alpha < 1):
            raise ConfigError(
                f"lora.rank is {self.rank} and lora.alpha {self.alpha}; both must be at least 1"
            )
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout is {self.dropout}; it must lie in [0, 1)")
        if not self.parts:
            raise ConfigError(
                f"lora.parts is empty; name some of {', '.join(get_args(Module))}, or leave LoRA "
                "off with --lora=null"
            )


@dataclass(frozen=True, slots=True)
class Adapted:
    """What of a model is adapted, by full names.

    Attributes:
        layers: Linear layers.
        experts: Parameters that hold all experts of a layer, with three axes.
    """

    layers: tuple[str, ...]
    experts: tuple[str, ...]


def add_adapters(
    model: CascadeVLForConditionalGeneration,
    config: LoraConfig,
    *,
    frozen: Sequence[Module] = (),
    seed: int,
) -> None:
    """Put adapters into a model, in place, so that they alone are trained.

    Args:
        model: The model, in its final precision.
        config: The settings.
        frozen: Parts that stay as they are even where ``config.parts`` names them.
        seed: Of the random A matrices: all processes of a run need the same.

    Raises:
        ConfigError: If nothing is left to adapt, or a target is not there.
    """
    adapted = find_targets(model, config, frozen=frozen)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # adapters are drawn on the CPU
        inject(model, peft_config(config, adapted))
    model.requires_grad_(False)
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)


def find_targets(model: nn.Module, config: LoraConfig, *, frozen: Sequence[Module] = ()) -> Adapted:
    """What the settings adapt of this model.

    Args:
        model: A model without adapters.
        config: The settings.
        frozen: Parts that get no adapters.

    Raises:
        ConfigError: If nothing is left to adapt, or a target is not there.
    """
    parts = [part for part in config.parts if part not in frozen]
    if not parts:
        raise ConfigError(
            f"lora.parts ({', '.join(config.parts)}) names nothing but parts that model.frozen "
            f"({', '.join(frozen)}) keeps as they are; change one of them"
        )
    layers = [name for name in _linear_layers(model) if module_of(name) in parts]
    experts = [name for name in _expert_weights(model) if module_of(name) in parts]
    if not config.experts:
        experts = []
    for target in config.targets:
        if not any(_ends_with(name, target) for name in (*layers, *experts)):
            raise ConfigError(_no_such_target(target, (*layers, *experts), parts))
    return Adapted(
        tuple(name for name in layers if _is_target(name, config)),
        tuple(name for name in experts if _is_target(name, config)),
    )


def peft_config(config: LoraConfig, adapted: Adapted) -> peft.LoraConfig:
    """The settings in peft's words.

    Args:
        config: The settings.
        adapted: What they adapt of the model.

    Raises:
        ConfigError: If experts are adapted in a way that peft cannot.
    """
    if adapted.experts and (config.dropout or config.dora):
        name = "lora.dora" if config.dora else "lora.dropout"
        raise ConfigError(
            f"{name} does not work on experts, and {len(adapted.experts)} weights of experts are "
            f"to be adapted; leave it off, or adapt no experts with --lora.experts false"
        )
    default = 0.0 if adapted.experts else DROPOUT
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank if config.alpha is None else config.alpha,
        lora_dropout=default if config.dropout is None else config.dropout,
        target_modules=_pattern(adapted.layers) if adapted.layers else [],
        target_parameters=sorted({_tail(name) for name in adapted.experts}) or None,
        use_rslora=config.rslora,
        use_dora=config.dora,
    )


def _linear_layers(model: nn.Module) -> Iterator[str]:
    """Linear layers of the three parts; the head, which may be the embedding, is none of them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("model."):
            yield name


def _expert_weights(model: nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and ".experts." in name:
            yield name


def _is_target(name: str, config: LoraConfig) -> bool:
    targets = config.targets or TARGETS[module_of(name)]
    return any(_ends_with(name, target) for target in targets)


def _ends_with(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _tail(name: str) -> str:
    """The last three parts of a name, such as ``mlp.experts.down_proj``."""
    return ".".join(name.split(".")[-3:])


def _pattern(names: Iterable[str]) -> str:
    """A regular expression for names that differ in the number of their layer only."""
    return "|".join(sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(n)) for n in names}))


def _no_such_target(target: str, names: Sequence[str], parts: Sequence[str]) -> str:
    ends = sorted({".".join(name.split(".")[-size:]) for name in names for size in (1, 2, 3)})
    near = process.extractOne(target, ends, scorer=fuzz.ratio)
    hint = f"did you mean {near[0]!r}?" if near else "there is no layer to adapt"
    return (
        f"lora.targets: no layer of the adapted parts ({', '.join(parts)}) has a name that ends "
        f"with {target!r}; {hint}"
    )
