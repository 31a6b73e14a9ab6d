"""Packed attention on a GPU: torch's variable-length flash attention, where it can be used.

Elsewhere, and where attention sinks are needed, `cascadevl.model.packed_attention` serves GPUs too.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cascadevl.model.layout import PackedLayout

_MIN_CAPABILITY = (8, 0)  # flash attention needs Ampere or newer
_MAX_HEAD_DIM = 256
_ARGUMENTS = {"scale", "window_size", "enable_gqa"}  # early versions of torch's function lack some


@functools.cache
def torch_kernel() -> Callable[..., Any] | None:
    """The function of torch, or None where this torch has none or it lacks an argument we need."""
    try:
        kernel = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    known = set(inspect.signature(kernel).parameters)
    return kernel if known >= _ARGUMENTS else None


def can_use_varlen(query: Float[Tensor, "rows heads tokens dim"]) -> bool:
    """Whether torch's variable-length attention serves this device, precision and head size."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= _MAX_HEAD_DIM
        and torch.cuda.get_device_capability(query.device) >= _MIN_CAPABILITY
        and torch_kernel() is not None
    )


def varlen_attention(
    query: Float[Tensor, "rows heads tokens dim"],
    key: Float[Tensor, "rows kv_heads tokens dim"],
    value: Float[Tensor, "rows kv_heads tokens dim"],
    layout: PackedLayout,
    *,
    scaling: float,
    window: int | None,
    kernel: Callable[..., Any] | None = None,
) -> Float[Tensor, "rows tokens heads dim"]:
    """Attention of packed rows with one variable-length sequence a segment.

    The keys of a segment are its ancestors' and its own, so there are at least as many keys as
    queries, and flash attention aligns its causal mask with the last of both.

    Args:
        query: Queries.
        key: Keys; queries of ``heads / kv_heads`` heads share one.
        value: Values.
        layout: Who sees whom.
        scaling: Factor of the scores.
        window: Tokens a query sees, itself included; None for all.
        kernel: Instead of torch's function, with its arguments.
    """
    kernel = kernel or torch_kernel()
    assert kernel is not None, "can_use_varlen was not asked"
    rows, num_heads, width, dim = query.shape

    def gathered(states: Tensor, index: Tensor) -> Tensor:
        return states.transpose(1, 2).reshape(rows * width, -1, dim).index_select(0, index)

    out: Tensor = kernel(
        gathered(query, layout.own),
        gathered(key, layout.chain),
        gathered(value, layout.chain),
        layout.own_starts,
        layout.chain_starts,
        layout.longest_own,
        layout.longest_chain,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=key.shape[1] != num_heads,
    )
    empty = out.new_zeros(rows * width, num_heads, dim)
    return empty.index_copy(0, layout.own, out).view(rows, width, num_heads, dim)
