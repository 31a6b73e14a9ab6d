"""From a picture to tiles: the dynamic high resolution of the InternVL family.

A picture is resized to the grid of tiles whose shape is nearest to its own, cut row by row, and
followed by a thumbnail of the whole (InternVL3 report, section 2.1; rule and constants of the
released processors). PIL's bicubic filter is used because it reproduces the released pixels
exactly. Every tile limit in the package goes through this one module.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cascadevl.errors import ConfigError, DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class TilingConfig:
    """How pictures are cut into tiles.

    Attributes:
        tile_px: Side of a tile; 448 in all released models.
        min_tiles: Fewest tiles of a grid, the thumbnail not counted.
        max_tiles: Most tiles of a grid, the thumbnail not counted (released: 12).
        thumbnail: Whether the whole picture follows as one more tile where there are several.
        dynamic: False resizes every picture to one tile, whatever its shape.
    """

    tile_px: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    dynamic: bool = True

    def __post_init__(self) -> None:
        """Refuse limits that no grid can meet.

        Raises:
            ConfigError: If a number is below 1 or ``min_tiles`` is above ``max_tiles``.
        """
        if self.tile_px < 1:
            raise ConfigError(f"tile_px is {self.tile_px}, but a tile needs at least 1 pixel")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ConfigError(
                f"min_tiles is {self.min_tiles} and max_tiles {self.max_tiles}, "
                "but 1 <= min_tiles <= max_tiles must hold"
            )


@dataclass(frozen=True, slots=True)
class _Grids:
    """All grids of a limit, ordered by shape so that the nearest is found by bisection.

    Attributes:
        ratios: The distinct values of columns / rows, ascending.
        grids: For each ratio its grids as (place in the released order, columns, rows).
    """

    ratios: tuple[float, ...]
    grids: tuple[tuple[tuple[int, int, int], ...], ...]


@lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int) -> _Grids:
    candidates = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    candidates.sort(key=lambda grid: grid[0] * grid[1])  # stable: ties keep columns ascending
    by_ratio: dict[float, list[tuple[int, int, int]]] = {}
    for place, (columns, rows) in enumerate(candidates):
        by_ratio.setdefault(columns / rows, []).append((place, columns, rows))
    ratios = sorted(by_ratio)
    return _Grids(tuple(ratios), tuple(tuple(by_ratio[ratio]) for ratio in ratios))


def choose_grid(width: int, height: int, config: TilingConfig) -> tuple[int, int]:
    """Choose the grid nearest in shape to a picture.

    The smallest ``|width / height - columns / rows|`` wins, in float64 as released. Among exact
    ties, taken by rising area, a later grid replaces an earlier one if the picture has more than
    half of the grid's pixels.

    Args:
        width: Width of the picture in pixels.
        height: Height of the picture in pixels.
        config: The limits.

    Returns:
        Columns and rows.

    Raises:
        DataError: If the picture has no pixels.
    """
    if width < 1 or height < 1:
        raise DataError(
            f"the picture measures {width} x {height} pixels",
            kind="corrupt_image",
            remedy="give a picture with at least one pixel",
        )
    if not config.dynamic or config.max_tiles == 1:
        return 1, 1
    grids = _grids(config.min_tiles, config.max_tiles)
    best, area = (1, 1), width * height
    for number, (_, columns, rows) in enumerate(_nearest(width / height, grids)):
        # 2 * area > tile area is the released `area > 0.5 * tile area` in whole numbers.
        if number == 0 or 2 * area > config.tile_px * config.tile_px * columns * rows:
            best = (columns, rows)
    return best


def _nearest(ratio: float, grids: _Grids) -> list[tuple[int, int, int]]:
    """All grids at the smallest distance, in the released order."""
    ratios = grids.ratios
    right = bisect_left(ratios, ratio)
    left = right - 1
    above = ratios[right] - ratio if right < len(ratios) else float("inf")
    below = ratio - ratios[left] if left >= 0 else float("inf")
    if above != below:
        return list(grids.grids[right if above < below else left])
    return sorted((*grids.grids[left], *grids.grids[right]))


def tile_image(image: PIL.Image.Image, config: TilingConfig) -> UInt8[np.ndarray, "tiles px px 3"]:
    """Cut a picture into tiles, row by row; the thumbnail comes last where there are several.

    Args:
        image: The picture; converted to RGB where it is not.
        config: Tile size and limits.

    Raises:
        DataError: If the picture has no pixels.
    """
    if image.mode != "RGB":
        image = image.convert("RGB")
    px = config.tile_px
    columns, rows = choose_grid(image.width, image.height, config)
    num_tiles = columns * rows
    num_thumbnails = int(config.thumbnail and num_tiles > 1)
    tiles = np.empty((num_tiles + num_thumbnails, px, px, 3), dtype=np.uint8)
    whole = _resized(image, columns * px, rows * px)
    tiles[:num_tiles].reshape(rows, columns, px, px, 3)[...] = whole.reshape(
        rows, px, columns, px, 3
    ).swapaxes(1, 2)
    if num_thumbnails:
        tiles[-1] = _resized(image, px, px)
    return tiles


def _resized(
    image: PIL.Image.Image, width: int, height: int
) -> UInt8[np.ndarray, "rows columns 3"]:
    if image.size != (width, height):
        image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    return np.asarray(image)


def num_tiles_of(width: int, height: int, config: TilingConfig) -> int:
    """How many tiles a picture of this size gives, thumbnail included.

    Args:
        width: Width of the picture in pixels.
        height: Height of the picture in pixels.
        config: The limits.

    Raises:
        DataError: If the picture has no pixels.
    """
    columns, rows = choose_grid(width, height, config)
    return columns * rows + int(config.thumbnail and columns * rows > 1)


def normalise(
    tiles: UInt8[np.ndarray, "tiles px px 3"] | UInt8[Tensor, "tiles px px 3"],
    device: torch.device | str | None = None,
) -> Float[Tensor, "tiles 3 px px"]:
    """Scale tiles to what the vision transformer takes: ImageNet mean 0 and deviation 1.

    Tiles are bytes wherever they wait or travel, and become numbers here alone, on the device that
    encodes them. Bytes are moved, a quarter of what the numbers would be.

    Args:
        tiles: RGB tiles.
        device: Where the result is to be; where the tiles are if None, of an array the CPU.

    Returns:
        Contiguous float32 tiles, channels first: the ``pixel_values`` of the released models.
    """
    if isinstance(tiles, np.ndarray):
        tiles = torch.from_numpy(np.ascontiguousarray(tiles))
    mean = torch.tensor(IMAGENET_MEAN, dtype=torch.float32).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, dtype=torch.float32).view(3, 1, 1)
    channels_first = tiles.to(device).permute(0, 3, 1, 2)
    # In place, a rounding at a time, by factors from the CPU: the same values on every device.
    values = channels_first.to(torch.float32, memory_format=torch.contiguous_format)
    values *= (1.0 / (255.0 * std)).to(values.device)
    values -= (mean / std).to(values.device)
    return values


def limit_for(num_images: int, config: TilingConfig) -> TilingConfig:
    """The limits of each picture when a sample shows several.

    The tiles of one picture are shared out: at most ``max(1, max_tiles // num_images)`` each, as
    in the released training code.

    Args:
        num_images: Pictures of the sample; 0 counts as 1.
        config: The limits for a single picture.
    """
    if num_images <= 1:
        return config
    most = max(1, config.max_tiles // num_images)
    return replace(config, max_tiles=most, min_tiles=min(config.min_tiles, most))
