"""Low-rank adapters (LoRA) in a model: put in, switched off, merged.

peft's layers take the places of single linear layers (and of fused experts), so that the model
stays a `CascadeVLForConditionalGeneration` and everything that calls it goes on to work. A base
weight ``x.weight`` is then called ``x.base_layer.weight``, beside ``x.lora_A`` and ``x.lora_B``.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import peft
import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

ADAPTER = "default"
"""peft's name of the one adapter that a model of ours has; no file mentions it."""

_MARK = ".lora_"
_SAMPLED = 16  # values of each base tensor that enter its fingerprint
_NOTED = "noted_fingerprint"


def inject(model: nn.Module, config: peft.LoraConfig) -> None:
    """Put adapters into a model, in place, with peft's random values (and no effect yet).

    Afterwards only the adapters have ``requires_grad``; they have the base weights' type.

    Args:
        model: A model without adapters.
        config: peft's description of them.

    Raises:
        ValueError: By peft, if the description fits no layer.
    """
    peft.inject_adapter_in_model(config, model, ADAPTER)
    for _, layer in adapter_layers(model):
        dtype = layer.get_param().dtype if isinstance(layer, ParamWrapper) else layer.weight.dtype
        for parameter in adapter_parameters(layer).values():  # peft keeps them in float32
            parameter.data = parameter.data.to(dtype)


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter, by its name."""
    return _MARK in name


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return any(is_adapter(name) for name, _ in model.named_parameters())


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The adapted layers with the names they have in the model."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all adapters by name."""
    return {n: p for n, p in model.named_parameters() if is_adapter(f".{n}")}


def plain_name(name: str) -> str:
    """The name that a base weight, or an adapted layer, has in a model without adapters."""
    return re.sub(r"\.base_layer(?=\.|$)", "", name)


def sharing(model: nn.Module) -> nn.Module:
    """A second model that is made of the first one's tensors, for an adapter of its own.

    It takes no memory but for its modules. What changes a weight of one changes the other's; what
    is put beside a weight (`inject`), and the configuration, belongs to one alone.

    Args:
        model: A model; its adapters, if it has some, are shared too.
    """
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=tensors)


def adapts_only_language(model: nn.Module) -> bool:
    """Whether a model's adapters leave its vision half as it is in the base."""
    language = ("model.language_model.", "lm_head.")
    return all(name.startswith(language) for name in adapter_parameters(model))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Compute with the base weights alone inside, bit for bit as before adapters were put in.

    This is the reference model of preference optimisation, without a second copy of the weights.
    A model without adapters is left as it is.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        for layer in layers:
            layer.enable_adapters(enabled=False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)
        for name, parameter in model.named_parameters():  # peft sets them as it sees fit
            parameter.requires_grad_(trained[name])


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers without adapters, by their plain names."""
    state: Mapping[str, Tensor] = model.state_dict()
    return {plain_name(name): value for name, value in state.items() if not is_adapter(name)}


def merged_reader(model: nn.Module) -> Callable[[str], Tensor]:
    """A reader of the weights that need no adapters any more, by their plain names.

    Sums are computed in float32, one layer at a time, and rounded once to the base weight's type;
    the model stays as it is. Of a model without adapters it reads the weights.
    """
    tensors = base_tensors(model)
    adapted = {
        f"{plain_name(name)}.{_weight_name(layer)}": layer for name, layer in adapter_layers(model)
    }

    @lru_cache(maxsize=1)  # the experts of a layer are written one by one
    def read(name: str) -> Tensor:
        if name not in adapted:
            return tensors[name].detach()
        layer = copy.deepcopy(adapted[name]).float()
        layer.merge()
        merged: Tensor = getattr(layer.get_base_layer(), _weight_name(layer))
        return merged.detach().to(tensors[name].dtype)

    return read


def merged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights that need no adapters any more, by their plain names, all at once.

    What is not adapted is the model's own tensor, not a copy of it. With these an engine's copy
    of the base is brought up to date (`cascadevl.engine.packed_weights.PackedModel.refresh`).
    """
    read = merged_reader(model)
    return {name: read(name) for name in base_tensors(model)}


def fingerprint(model: nn.Module) -> str:
    """A short word that tells base models apart, whatever their precision and their adapters.

    It is made of the first values of every tensor, rounded to bfloat16: another stage of the same
    shape differs in nearly all of them. Of a model that was divided it is the one noted before.
    """
    noted: str | None = getattr(model, _NOTED, None)
    return noted if noted is not None else _digest(first_values(model.named_parameters()))


def first_values(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, bytes]:
    """The first values of base weights, by their plain names.

    Args:
        parameters: By name; adapters are left out.
    """
    return {
        plain_name(name): p.detach()
        .flatten()[:_SAMPLED]
        .to(torch.bfloat16)
        .cpu()
        .view(torch.int16)
        .numpy()
        .tobytes()
        for name, p in parameters
        if not is_adapter(name)
    }


def _digest(values: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(name.encode() + values[name])
    return digest.hexdigest()[:16]


def note_fingerprint(model: nn.Module, values: Mapping[str, bytes]) -> None:
    """Keep a model's fingerprint, because its values are no longer at hand: it is divided.

    Args:
        model: The model.
        values: `first_values` of all its weights.
    """
    setattr(model, _NOTED, _digest(values))


def forget_fingerprint(model: nn.Module) -> None:
    """Take a model's fingerprint anew from now on: its values are at hand again."""
    if hasattr(model, _NOTED):
        delattr(model, _NOTED)


def _weight_name(layer: LoraLayer) -> str:
    """Which parameter of its base layer an adapter changes."""
    return str(layer.parameter_name) if isinstance(layer, ParamWrapper) else "weight"
