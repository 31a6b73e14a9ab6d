"""Where the projector of compressed tiles begins: as the mean of what the first projector makes.

A compressed token stands for a square of four full ones (of 4 x 4 patches instead of 2 x 2). The
report does not say what its projector starts from. From random weights a language model sees
noise in every compressed tile, and most of stage 1 is spent on that; here it sees a coarser picture
from the first step on (docs/decisions/0028).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cascadevl.errors import ConfigError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.projector import CompressedProjector, Projector


def start_as_mean(model: CascadeVLForConditionalGeneration) -> None:
    """Give the second projector weights made of the first one's, in place.

    The square is halved into a left and a right part. The first layer has one copy of the first
    projector's hidden layer for each half, on the mean of the half's squares; the second layer adds
    both up through the first projector's second layer and holds each sum and its negative; the last
    one takes their difference, because ``act(x) - act(-x) = x``. So a compressed token is the mean
    of two tokens, each of which is what the first projector makes of the mean of half the squares.
    Where these are equal it is the full token itself.

    Args:
        model: A model with both projectors.

    Raises:
        ConfigError: If the model has no second projector, its squares cannot be halved, or its
            activation does not allow it.
    """
    full, compressed = model.model.multi_modal_projector, model.model.compressed_projector
    if compressed is None:
        raise ConfigError("the model has no projector for compressed tiles; add one (add_flash)")
    inner, outer = round(1 / full.ratio), round(1 / compressed.ratio)
    if outer % (2 * inner):
        raise ConfigError(
            f"a compressed token is made of {outer} x {outer} patches and a full one of {inner} x "
            f"{inner}; the start needs squares of full ones that can be halved"
        )
    ramp = torch.linspace(-4, 4, 9)
    if not torch.allclose(full.act(ramp) - full.act(-ramp), ramp, atol=1e-5):
        raise ConfigError(
            f"projector_hidden_act is {model.config.projector_hidden_act!r}; the start needs one "
            "with act(x) - act(-x) = x, as gelu, silu and relu have it"
        )
    with torch.no_grad():
        _fill(full, compressed, outer // inner, inner)


def _fill(full: Projector, compressed: CompressedProjector, span: int, inner: int) -> None:
    """Write the weights; ``span`` squares of ``inner`` patches along each side."""
    for name in ("weight", "bias"):
        value = getattr(full.layer_norm, name)
        getattr(compressed.layer_norm, name).copy_(_spread(value[None], span, inner).flatten())
    hidden = full.linear_2.out_features
    squares = _spread(full.linear_1.weight, span, inner) / (span * span // 2)
    columns = torch.arange(span * inner, device=squares.device) < span * inner // 2
    left = torch.where(columns[:, None], squares, 0)  # (hidden, rows, columns, channels)
    compressed.linear_1.weight.copy_(torch.cat([left, squares - left]).flatten(1))
    compressed.linear_1.bias.copy_(full.linear_1.bias.repeat(2))
    summed = full.linear_2.weight.repeat(1, 2) / 2
    compressed.linear_2.weight.copy_(torch.cat([summed, -summed]))
    compressed.linear_2.bias.copy_(torch.cat([full.linear_2.bias, -full.linear_2.bias]))
    one = torch.eye(hidden, dtype=squares.dtype, device=squares.device)
    compressed.linear_3.weight.copy_(torch.cat([one, -one], dim=1))
    compressed.linear_3.bias.zero_()


def _spread(
    weight: Float[Tensor, "out joined"], span: int, inner: int
) -> Float[Tensor, "out rows columns channels"]:
    """Weights of one square's patches, repeated for every square of the larger one."""
    patches = weight.reshape(len(weight), inner, inner, -1)
    return patches.repeat(1, span, span, 1)
