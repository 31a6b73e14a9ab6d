# %% [markdown]
# # What the model gets of a picture
#
# A vision transformer of the InternVL family sees squares of one size. A picture is therefore
# resized to the grid of tiles whose shape is nearest to its own and cut; a small copy of the
# whole, the thumbnail, follows. This page walks through that, without any model.

# %%
import tempfile
from pathlib import Path

import PIL.Image
import PIL.ImageDraw

from cascadevl.data.tiling import TilingConfig, choose_grid, limit_for, normalise, tile_image
from cascadevl.workflows.show import lay_out
from cascadevl.workflows.show_drawing import draw

# %% [markdown]
# A picture to look at: a receipt, tall and narrow, with small print.

# %%
picture = PIL.Image.new("RGB", (720, 1600), "white")
pen = PIL.ImageDraw.Draw(picture)
for line in range(24):
    words = f"item {line + 1:02d} ........ {3 * line + 1:3d}.00"
    pen.text((40, 40 + 64 * line), words, fill="black", font_size=40)

# %% [markdown]
# ## Which grid
#
# Of all grids with at most `max_tiles` tiles the one whose ratio of columns to rows is nearest to
# the ratio of width to height wins; of several that match equally well, a larger one if the picture
# has more than half of its pixels. A larger limit allows a better match, and more detail.

# %%
for max_tiles in (1, 4, 6, 12, 24):
    columns, rows = choose_grid(*picture.size, TilingConfig(max_tiles=max_tiles))
    print(f"at most {max_tiles:2d} tiles: {columns} x {rows} = {columns * rows}")

# %% [markdown]
# ## The tiles
#
# They come row by row, the thumbnail last. It is left out where there is only one tile, because
# it would be that tile again.

# %%
tiling = TilingConfig(tile_px=448, max_tiles=12)
tiles = tile_image(picture, tiling)
columns, rows = choose_grid(*picture.size, tiling)
print(f"{len(tiles)} tiles of {tiles.shape[1]} x {tiles.shape[2]} px, {tiles.dtype}")
assert len(tiles) == columns * rows + 1

only = tile_image(picture, TilingConfig(max_tiles=1))
assert len(only) == 1  # no thumbnail

# %% [markdown]
# The model takes them as floats, normalised by the mean and spread of ImageNet.

# %%
pixels = normalise(tiles)
print(f"{tuple(pixels.shape)}, from {float(pixels.min()):.2f} to {float(pixels.max()):.2f}")

# %% [markdown]
# ## What it costs
#
# The vision tower makes 32 x 32 patch features of a tile of 448 px, pixel shuffle puts four of
# them together: 256 visual tokens a tile. So a picture may cost as much as a long text:

# %%
print(f"{len(tiles)} tiles x 256 = {256 * len(tiles)} visual tokens")

# %% [markdown]
# Several pictures of one conversation share the limit in training, so that ten pictures do not
# cost ten times as much:

# %%
for num_images in (1, 2, 5, 20):
    limit = limit_for(num_images, tiling).max_tiles
    print(f"number of pictures {num_images:2d}, most tiles of each {limit:2d}")

# %% [markdown]
# ## A drawing of it
#
# `cascadevl show receipt.png` draws this for any picture.

# %%
folder = Path(tempfile.mkdtemp(prefix="cascadevl-"))
picture.save(folder / "receipt.png")
layout = lay_out(folder / "receipt.png", tiling)
draw(layout, folder / "receipt.tiles.png")
print(layout.summary)
print(f"drawn in {folder / 'receipt.tiles.png'}")
