"""Weights laid out for inference on a CPU: packed as oneDNN reads them, or in int8.

A decode step reads every weight once, and torch's ``F.linear`` first copies a weight into the
order its kernels want, at every call. `pack` does that once. The packed layers stand in a second
tree of modules, which shares everything else (embeddings, norms, fused experts) with the model
that is trained; or, for serving, in the model itself, whose own weights are freed. Names stay those
of the model, so that new weights are loaded by the names of its state. The vision half is packed
too, never in int8: its many rows a call are bound by computing, not by reading.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cascadevl.engine.int8_linear import Int8Linear, refuse_gradient
from cascadevl.engine.joined_linear import PartOfJoined, join, sets_of
from cascadevl.errors import CheckpointError, ConfigError
from cascadevl.model.adapters import has_adapters
from cascadevl.model.checkpoint import HEAD
from cascadevl.model.modeling import CascadeVLForConditionalGeneration

Precision: TypeAlias = Literal["packed", "int8"]
"""``packed``: the weights' own type (bfloat16 or float32), in oneDNN's order. ``int8``: 8 bits a
weight with a scale for every output channel, activations bfloat16."""

Weights: TypeAlias = Literal["stored", Precision]
"""How a model is held for inference: as it was stored, or packed."""

_HEAD = HEAD.removesuffix(".weight")
_LANGUAGE = "model.language_model."
_VISION = ("model.vision_tower.", "model.multi_modal_projector.", "model.compressed_projector.")
_EMBEDDING = f"{_LANGUAGE}embed_tokens.weight"


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU, its weight in the order of oneDNN's kernels."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        """Pack a weight.

        Args:
            weight: The weight of an `nn.Linear`; it is only read.
            bias: Its bias, copied; or None.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._packed: Tensor | None = None
        self.bias = None if bias is None else torch.empty_like(bias, requires_grad=False)
        self.load(weight, bias)

    @property
    def has_bias(self) -> bool:
        """Whether it has a bias."""
        return self.bias is not None

    def load(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        """Take other weights of the same shape; the old ones are freed first."""
        self._packed = None
        plain = weight.detach().to(self.dtype).contiguous()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(plain)
        if self.bias is not None:
            assert bias is not None, "the layer was made with a bias"
            self.bias.copy_(bias.detach())

    @property
    def num_bytes(self) -> int:
        """Memory of the packed weight and the bias."""
        packed: int = torch.ops.mkldnn._nbytes(self._packed)
        return packed + (0 if self.bias is None else self.bias.nbytes)

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """Apply the layer.

        Raises:
            ValueError: If the input has another type than the weight, or a gradient is wanted.
        """
        refuse_gradient(x)
        if x.dtype != self.dtype:
            raise ValueError(
                f"a layer packed in {self.dtype} was given {x.dtype}; pack a model of the type it "
                f"runs in, and do not use autocast around it"
            )
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return out

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.dtype}"


Layer: TypeAlias = PackedLinear | Int8Linear | PartOfJoined


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightBytes:
    """Memory of a packed model, in bytes.

    Attributes:
        plain: What the layers that were packed take in the model they came from; a head that is
            tied to the token embedding counts, as every decode step reads it.
        packed: What their packed form takes, beside ``plain`` or instead of it.
        released: What packing gave back: 0 if the originals are kept. The table of a tied head
            stays, because it is the token embedding.
        left: Parameters that stay as they are: embeddings, norms, routers and fused experts.
    """

    plain: int
    packed: int
    released: int
    left: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedModel:
    """A model for inference, and what is needed to give it new weights.

    Attributes:
        model: Used as any model, under ``torch.inference_mode()``. Do not move, cast or train it:
            it shares parameters with the model it was made of, unless that was released.
        precision: How the linear layers of its language half are packed.
        head: How its language head is packed.
        layers: The packed layers, by their names in the model.
        shares: Whether its other parameters are those of the model it was made of.
        size: Its memory.
    """

    model: CascadeVLForConditionalGeneration
    precision: Precision
    head: Precision
    layers: Mapping[str, Layer]
    shares: bool
    size: WeightBytes

    @torch.inference_mode(False)  # inference tensors could not be refreshed outside that mode
    @torch.no_grad()
    def refresh(self, source: nn.Module | Mapping[str, Tensor]) -> None:
        """Take new weights, layer by layer and in place, as after a step of the optimiser.

        Shared parameters that the source shares too are already new. Others are copied, but never
        into a tensor that is shared: the model this one was made of stays as it is.

        Args:
            source: The model that is trained, or a state by its names. A tied head may be absent.

        Raises:
            CheckpointError: If tensors are missing, unexpected or misshapen; nothing is changed
                then. Or if ``int8`` meets a weight that is not finite; some layers are new then,
                and the model is of no use until a refresh succeeds.
        """
        state = source.state_dict() if isinstance(source, nn.Module) else dict(source)
        if HEAD not in state and _EMBEDDING in state and self.model.config.tie_word_embeddings:
            state[HEAD] = state[_EMBEDDING]
        others = {**dict(self.model.named_parameters()), **_saved_buffers(self.model)}
        _check(state, self._shapes() | {name: tuple(t.shape) for name, t in others.items()})
        for name, layer in self.layers.items():
            layer.load(state[f"{name}.weight"], state.get(f"{name}.bias"))
        for name, ours in others.items():
            theirs = state[name]
            if ours.data_ptr() == theirs.data_ptr():
                continue
            if self.shares:
                _replace(self.model, name, theirs.to(ours, copy=True))
            else:
                ours.copy_(theirs)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the packed layers hold."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, layer in self.layers.items():
            shapes[f"{name}.weight"] = (layer.out_features, layer.in_features)
            if layer.has_bias:
                shapes[f"{name}.bias"] = (layer.out_features,)
        return shapes


def can_pack(model: CascadeVLForConditionalGeneration) -> bool:
    """Whether oneDNN of this torch packs and multiplies the model's type on this machine."""
    return _obstacle(model) is None


def held(
    model: CascadeVLForConditionalGeneration, weights: Weights
) -> CascadeVLForConditionalGeneration | PackedModel:
    """A model, or half of one, that is only to answer: packed in place of itself, if so wished.

    Args:
        model: The model; it cannot be trained or saved any more once it is packed.
        weights: How it is to be held.

    Raises:
        ConfigError: As `pack`, and so is the next.
        CheckpointError: If ``int8`` meets a weight that is not finite.
    """
    return model if weights == "stored" else pack(model, weights, release=True)


@torch.inference_mode(False)
@torch.no_grad()
def pack(
    model: CascadeVLForConditionalGeneration,
    precision: Precision,
    *,
    head: Precision | None = None,
    release: bool = False,
) -> PackedModel:
    """Pack the linear layers of both halves, the language head included.

    Fused experts, routers, norms and embeddings stay as they are. Of one half of a model that was
    opened alone, what is there is packed.

    Args:
        model: The model. It is not touched, unless it is released.
        precision: How the layers of the language half are packed; those of the vision half keep
            their type, in oneDNN's order.
        head: How the language head is packed, if otherwise. Of small models with large
            vocabularies it is a quarter of what a decode step reads.
        release: Put the packed layers into ``model`` itself and free the originals as it goes:
            one layer is held twice at a time. The model cannot be trained or saved any more.

    Raises:
        ConfigError: If the model's device or type cannot be packed here.
        CheckpointError: If ``int8`` meets a weight that is not finite.
    """
    if (obstacle := _obstacle(model)) is not None:
        raise ConfigError(f"precision {precision!r}: {obstacle}")
    kinds: dict[Precision, type[PackedLinear | Int8Linear]]
    kinds = {"packed": PackedLinear, "int8": Int8Linear}
    head_is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    plain = released = 0
    layers: dict[str, Layer] = {}
    memo: dict[int, object] = {}
    for names in sets_of(dict(_linears(model))):
        linears = [model.get_submodule(name) for name in names]
        if names[0].startswith(_VISION):
            kind = kinds["packed"]
        else:
            kind = kinds[head or precision if names == (_HEAD,) else precision]
        for name, linear, layer in zip(names, linears, _packed(linears, kind), strict=True):
            layers[name] = layer
            num_bytes = sum(parameter.nbytes for parameter in linear.parameters())
            plain += num_bytes
            if release:
                model.set_submodule(name, layer)
                released += 0 if name == _HEAD and head_is_tied else num_bytes
            else:
                memo[id(linear)] = layer
    if release:
        packed_model = model.requires_grad_(False)
    else:
        # A deep copy takes what is in its memo instead of copying it: parameters are shared, packed
        # layers stand where linear ones stood, all else (settings, hooks, modes) is separate.
        memo |= {id(shared): shared for shared in chain(model.parameters(), model.buffers())}
        packed_model = copy.deepcopy(model, memo)
    packed_model.train(False)
    size = WeightBytes(
        plain=plain,
        packed=sum(layer.num_bytes for layer in layers.values()),
        released=released,
        left=sum(
            parameter.nbytes for parameter in packed_model.parameters() if _is_here(parameter)
        ),
    )
    return PackedModel(
        model=packed_model,
        precision=precision,
        head=head or precision,
        layers=layers,
        shares=not release,
        size=size,
    )


def _linears(model: CascadeVLForConditionalGeneration) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that are packed, by name; subclasses do something of their own."""
    for name, module in model.named_modules():
        is_one = type(module) is nn.Linear and _is_here(module.weight)
        if is_one and (name == _HEAD or name.startswith((_LANGUAGE, *_VISION))):
            yield name, module


def _is_here(parameter: Tensor) -> bool:
    """Whether a tensor was opened: of half a model the others are on the ``meta`` device."""
    return parameter.device.type != "meta"


def _packed(linears: Sequence[nn.Module], kind: type[PackedLinear | Int8Linear]) -> Sequence[Layer]:
    """A layer, or a set of them that is computed together, in another form."""
    plain = [linear for linear in linears if isinstance(linear, nn.Linear)]
    assert len(plain) == len(linears)
    return [kind(plain[0].weight, plain[0].bias)] if len(plain) == 1 else join(plain, kind)


def _obstacle(model: CascadeVLForConditionalGeneration) -> str | None:
    """Why this model cannot be packed here."""
    weight = next(filter(_is_here, model.parameters()), model.lm_head.weight)
    if has_adapters(model):
        return (
            "the model has adapters; pack it before they are put in, and refresh it with "
            "cascadevl.model.adapters.merged_tensors"
        )
    if weight.device.type != "cpu":
        return f"packed layers run on a CPU, and the model is on {weight.device}"
    if weight.dtype not in (torch.bfloat16, torch.float32):
        return f"the weights are {weight.dtype}; load them as bfloat16 or float32"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return (
            "oneDNN has no bfloat16 kernels for this processor (on x86 they need AVX-512); load "
            "the weights as float32, or do not pack them"
        )
    if not _agrees(weight.dtype):
        return f"oneDNN's packed product of {weight.dtype} is wrong on this machine; do not pack"
    return None


@cache
def _agrees(dtype: torch.dtype) -> bool:
    """Whether a packed product is right: what a processor says of itself is not always true."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator, dtype=torch.float64).to(dtype)
    x = torch.randn(3, 64, generator=generator, dtype=torch.float64).to(dtype)
    wanted = x.double() @ weight.double().T
    error = (PackedLinear(weight, None)(x).double() - wanted).norm() / wanted.norm()
    return float(error) < 4 * torch.finfo(dtype).eps


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a state holds, by name."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _check(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a state with what is wanted.

    Raises:
        CheckpointError: If they differ.
    """
    missing, unexpected = shapes.keys() - state.keys(), state.keys() - shapes.keys()
    if missing or unexpected:
        raise CheckpointError(
            f"the new weights lack {len(missing)} tensors and have {len(unexpected)} that the "
            f"model does not, for example {min(missing or unexpected)}; refresh with the state of "
            f"a model of the same configuration"
        )
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise CheckpointError(
                f"{name} has the shape {tuple(state[name].shape)} in the new weights and {shape} "
                f"in the model; refresh with the state of a model of the same configuration"
            )


def _replace(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a module a parameter or buffer of its own instead of a shared one."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    is_buffer = leaf in dict(module.named_buffers(recurse=False))
    setattr(module, leaf, tensor if is_buffer else nn.Parameter(tensor, requires_grad=False))
