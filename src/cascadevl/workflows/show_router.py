"""What a router makes of a picture: its layout with full and compressed tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from cascadevl.eval.tile_routes import route_tiles
from cascadevl.model.loading import load
from cascadevl.model.routing import VisualBudget
from cascadevl.workflows.show import PictureLayout, lay_out


def lay_out_routed(
    file: Path,
    model_path: str | Path,
    *,
    budget: VisualBudget | None = None,
    min_tiles: int | None = None,
    max_tiles: int | None = None,
    thumbnail: bool | None = None,
    increment: float = 1.0,
) -> PictureLayout:
    """Tile a picture as a model does, let its router decide, and place the tokens.

    Args:
        file: The picture.
        model_path: A Flash model: a folder or a name.
        budget: Which tiles are compressed; the model's own thresholds if None.
        min_tiles: Fewest tiles; the model's if None.
        max_tiles: Most tiles; the model's if None.
        thumbnail: Whether there is one; as in the model if None.
        increment: Position step of a visual token.

    Raises:
        DataError: If the picture cannot be read.
        CheckpointError: If the model cannot be opened.
        RequestError: If it has no router.
    """
    model, processor = load(model_path)
    own = processor.tiling
    most = max_tiles or own.max_tiles
    tiling = replace(
        own,
        max_tiles=most,
        min_tiles=min_tiles or min(own.min_tiles, most),
        thumbnail=own.thumbnail if thumbnail is None else thumbnail,
    )

    def route(
        tiles: UInt8[np.ndarray, "tiles px px 3"],
    ) -> tuple[Sequence[float], Sequence[int]]:
        routes = route_tiles(model, tiles, budget)
        return routes.probabilities, routes.tokens_per_tile

    return lay_out(
        file,
        tiling,
        tokens_per_tile=model.config.tokens_per_tile,
        increment=increment,
        route=route,
    )
