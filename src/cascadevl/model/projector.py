"""From patch features to visual tokens: pixel shuffle, then a small network.

InternVL3 report, section 2.1: pixel unshuffle leaves a quarter of the tokens, so that one tile of
448 x 448 pixels becomes 256 visual tokens. InternVL3.5 report, section on the visual resolution
router: a second projector leaves a sixteenth, 64 visual tokens, of tiles that can do with less.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from cascadevl.model.configuration import CascadeVLConfig

DROPOUT = 0.1
"""Share of activations that the compressed projector and the router drop in training (released)."""


def pixel_shuffle(
    features: Float[Tensor, "tiles rows columns channels"], ratio: float, version: str = "v2"
) -> Float[Tensor, "tiles new_rows new_columns new_channels"]:
    """Join each square of neighbouring patches into one token with all their channels.

    Args:
        features: Patch features of square tiles.
        ratio: New side over old side: 0.5 as released, 0.25 of compressed tiles.
        version: ``"v2"`` keeps the tokens in reading order; ``"v1"`` leaves them transposed.

    Raises:
        ValueError: If the side is not a multiple of ``1 / ratio``.
    """
    tiles, rows, columns, channels = features.shape
    factor = round(1 / ratio)
    if rows % factor or columns % factor:
        raise ValueError(
            f"{rows} x {columns} patches cannot be joined {factor} x {factor}; the tile's side in "
            f"patches must be a multiple of {factor}"
        )
    squares = features.reshape(tiles, rows // factor, factor, columns // factor, factor, channels)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    joined = squares.permute(order)
    return joined.reshape(*joined.shape[:3], factor * factor * channels)


class Projector(nn.Module):
    """LayerNorm, linear, activation, linear: the vision half's width to the language half's."""

    def __init__(self, config: CascadeVLConfig) -> None:
        """Build the layers under the names that transformers gives them."""
        super().__init__()
        width = config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2
        hidden_size = config.text_config.hidden_size
        self.ratio, self.version = config.downsample_ratio, config.ps_version
        self.layer_norm = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, patches: Float[Tensor, "tiles patches channels"]
    ) -> Float[Tensor, "tiles visual_tokens hidden"]:
        """Shuffle and project the patch features (without the class token) of square tiles."""
        squares = _squares(patches, self.ratio, self.version)
        visual: Tensor = self.linear_2(self.act(self.linear_1(self.layer_norm(squares))))
        return visual


class CompressedProjector(nn.Module):
    """The same for compressed tiles, of larger squares and a layer deeper, as released."""

    def __init__(self, config: CascadeVLConfig) -> None:
        """Build the layers."""
        super().__init__()
        width = config.vision_config.hidden_size * round(1 / config.flash_downsample_ratio) ** 2
        hidden_size = config.text_config.hidden_size
        self.ratio, self.version = config.flash_downsample_ratio, config.ps_version
        self.layer_norm = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, 2 * hidden_size)
        self.linear_2 = nn.Linear(2 * hidden_size, 2 * hidden_size)
        self.linear_3 = nn.Linear(2 * hidden_size, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.dropout = nn.Dropout(DROPOUT)

    def forward(
        self, patches: Float[Tensor, "tiles patches channels"]
    ) -> Float[Tensor, "tiles visual_tokens hidden"]:
        """Shuffle and project the patch features (without the class token) of square tiles."""
        states = self.layer_norm(_squares(patches, self.ratio, self.version))
        states = self.dropout(self.act(self.linear_1(states)))
        states = self.dropout(self.act(self.linear_2(states)))
        visual: Tensor = self.linear_3(states)
        return visual


def _squares(
    patches: Float[Tensor, "tiles patches channels"], ratio: float, version: str
) -> Float[Tensor, "tiles visual_tokens joined"]:
    """Patch features joined to squares, in the order of the visual tokens."""
    tiles, num_patches, channels = patches.shape
    side = round(num_patches**0.5)
    grid = patches.reshape(tiles, side, side, channels)
    return pixel_shuffle(grid, ratio, version).flatten(1, 2)
