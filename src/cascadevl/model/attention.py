"""Our attention functions, and how transformers' bodies come to use them.

They enter through transformers' `AttentionInterface`. The mask function registered beside them
returns None, because transformers would take any step of the positions other than 1 for the border
of a packed sample and cut visual tokens off from the text before them. The borders come from a
`PackedLayout` instead, or, where a cache holds the keys, from an explicit mask.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from cascadevl.model.dense_attention import dense_attention
from cascadevl.model.layout import TABLE, Buckets, PackedLayout
from cascadevl.model.packed_attention import packed_attention
from cascadevl.model.varlen import can_use_varlen, varlen_attention

TEXT_ATTENTION = "cascadevl"
VISION_ATTENTION = "cascadevl_dense"


@runtime_checkable
class Attend(Protocol):
    """Attention of one forward pass of a text body that someone else computes: the engine."""

    def __call__(
        self,
        layer: int,
        query: Float[Tensor, "rows heads tokens dim"],
        key: Float[Tensor, "rows kv_heads tokens dim"],
        value: Float[Tensor, "rows kv_heads tokens dim"],
        *,
        scaling: float,
        window: int | None,
        sinks: Float[Tensor, " heads"] | None,
    ) -> Float[Tensor, "rows tokens heads dim"]:
        """Attention of a layer's new tokens, whose keys and values it keeps."""
        ...


def attend_packed(
    query: Float[Tensor, "rows heads tokens dim"],
    key: Float[Tensor, "rows kv_heads tokens dim"],
    value: Float[Tensor, "rows kv_heads tokens dim"],
    buckets: Buckets,
    *,
    scaling: float,
    window: int | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "rows tokens heads dim"]:
    """Attention of packed rows by `packed_attention`; zeros where a token is padding."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # an operator is not reached by autocast: cast here
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    layout = {name: getattr(buckets, name) for name in buckets.__dataclass_fields__}
    with torch.autocast(kind, enabled=False):
        output: Tensor = packed_attention(
            query, key, value, sinks, **layout, scaling=scaling, window=window or 0, keep=keep
        )[0]
    return output


def attend_masked(
    query: Float[Tensor, "rows heads queries dim"],
    key: Float[Tensor, "rows kv_heads keys dim"],
    value: Float[Tensor, "rows kv_heads keys dim"],
    visible: Bool[Tensor, "rows 1 queries keys"],
    *,
    scaling: float,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "rows queries heads dim"]:
    """Attention under an explicit mask, for keys that come from a cache.

    A query that sees nothing (padding) gets the mean of all values rather than a NaN; nobody
    reads it.
    """
    rows, num_heads, num_queries, dim = query.shape
    num_kv = key.shape[1]
    grouped = (query * scaling).reshape(rows, num_kv, -1, dim)  # heads that share keys side by side
    scores = (grouped @ key.mT).view(rows, num_kv, -1, num_queries, key.shape[2])
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~visible[:, :, None], lowest)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, num_kv, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    weights = weights[..., : key.shape[2]].reshape(rows, num_kv, -1, key.shape[2])
    return (weights @ value).view(rows, num_heads, num_queries, dim).transpose(1, 2)


def text_attention(
    module: nn.Module,
    query: Float[Tensor, "rows heads queries dim"],
    key: Float[Tensor, "rows kv_heads keys dim"],
    value: Float[Tensor, "rows kv_heads keys dim"],
    attention_mask: Bool[Tensor, "rows 1 queries keys"] | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    packed_layout: PackedLayout | None = None,
    attend: Attend | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "rows queries heads dim"], None]:
    """Attention of the text bodies, as transformers' `AttentionInterface` calls it.

    Raises:
        ValueError: If neither a layout nor a mask says who sees whom, or dropout is asked for.
    """
    if dropout:
        raise ValueError(
            f"attention dropout {dropout} is not supported by {TEXT_ATTENTION!r}; "
            f"set attention_dropout to 0 in the text config"
        )
    if attend is not None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]  # every text body numbers them
        return attend(
            layer, query, key, value, scaling=scaling, window=sliding_window, sinks=s_aux
        ), None
    if packed_layout is not None:
        if s_aux is None and can_use_varlen(query):
            out = varlen_attention(
                query, key, value, packed_layout, scaling=scaling, window=sliding_window
            )
        else:
            buckets = packed_layout.of(sliding_window)
            out = attend_packed(
                query, key, value, buckets, scaling=scaling, window=sliding_window, sinks=s_aux
            )
        return out, None
    if attention_mask is None:
        raise ValueError(
            f"the attention {TEXT_ATTENTION!r} needs `packed_layout` or a 4D `attention_mask`; "
            f"call the composite model, which makes them, not its text body"
        )
    return attend_masked(query, key, value, attention_mask, scaling=scaling, sinks=s_aux), None


def vision_attention(
    module: nn.Module,
    query: Float[Tensor, "tiles heads tokens dim"],
    key: Float[Tensor, "tiles heads tokens dim"],
    value: Float[Tensor, "tiles heads tokens dim"],
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Float[Tensor, "tiles tokens heads dim"], None]:
    """Attention of the vision tower: every token of a tile sees the whole tile."""
    if query.device.type == "cpu" and not dropout:
        if query.shape[2] <= TABLE.plain_vision_tokens:
            weights = torch.softmax((query * scaling) @ key.mT, dim=-1)
            return (weights @ value).transpose(1, 2).contiguous(), None
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return dense_attention(query, key, value, scaling), None
    out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Make both attention functions known to transformers, under their names."""
    AttentionInterface.register(TEXT_ATTENTION, text_attention)
    AttentionInterface.register(VISION_ATTENTION, vision_attention)
    for name in (TEXT_ATTENTION, VISION_ATTENTION):
        AttentionMaskInterface.register(name, lambda *_, **__: None)
