from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from cascadevl.cli.main import main
from cascadevl.data.tiling import TilingConfig
from cascadevl.errors import ConfigError
from cascadevl.workflows.show import lay_out
from cascadevl.workflows.show_drawing import draw


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Six flat colours in a grid of 3 x 2, so that every tile is known by its colour."""
    cells = np.zeros((2, 3, 3), dtype=np.uint8)
    cells[0] = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    cells[1] = [[255, 255, 0], [0, 255, 255], [255, 0, 255]]
    pixels = cells.repeat(84, axis=0).repeat(84, axis=1)
    PIL.Image.fromarray(pixels).save(tmp_path / "six.png")
    return tmp_path / "six.png"


def test_tiles_stand_in_the_models_order_with_their_positions(picture: Path):
    tiling = TilingConfig(tile_px=84, max_tiles=6)
    layout = lay_out(picture, tiling, increment=0.25)
    assert (layout.columns, layout.rows) == (3, 2)
    assert [tile.name for tile in layout.tiles] == [
        *(f"tile {n}" for n in range(1, 7)),
        "thumbnail",
    ]
    centres = [tuple(tile.pixels[42, 42].tolist()) for tile in layout.tiles[:6]]
    assert centres == [
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)
    ]  # fmt: skip
    # <img> at 0; 9 tokens a tile, 0.25 apart; </img> one after the last of 63.
    first, second, last = layout.tiles[0], layout.tiles[1], layout.tiles[-1]
    assert [first.num_tokens, first.first_position, first.last_position] == [9, 0.25, 2.25]
    assert [second.first_position, second.last_position] == [2.5, 4.5]
    assert [last.last_position, layout.length] == [15.75, 16.75]


def test_tokens_of_a_tile_follow_from_its_size_unless_given(picture: Path):
    def tokens(px: int, given: int | None = None) -> int:
        config = TilingConfig(tile_px=px, max_tiles=1)
        return lay_out(picture, config, tokens_per_tile=given).tiles[0].num_tokens

    assert [tokens(448), tokens(224), tokens(112)] == [256, 64, 16]
    assert tokens(100, 7) == 7
    with pytest.raises(ConfigError, match="100 px"):
        tokens(100)


def test_the_drawing_holds_every_tile(picture: Path, tmp_path: Path):
    layout = lay_out(picture, TilingConfig(tile_px=84, max_tiles=6))
    draw(layout, tmp_path / "new" / "out.png")
    with PIL.Image.open(tmp_path / "new" / "out.png") as image:
        drawn = np.asarray(image.convert("RGB")).astype(np.int64) @ [1, 256, 65536]
    for tile in layout.tiles[:6]:  # in the picture, as a tile of its own, and in the thumbnail
        colour = int(tile.pixels[42, 42].astype(np.int64) @ [1, 256, 65536])
        assert (drawn == colour).sum() > 5000


def test_the_command_says_what_it_drew(picture: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--max-tiles", "6", "--tile-px", "84", "--increment", "1/2"]
    assert main(["show", str(picture), *words]) == 0
    with PIL.Image.open(picture.with_name("six.tiles.png")) as image:
        assert image.format == "PNG"
    shown = capsys.readouterr().out
    assert (
        "six.png: 252 x 168 px, 3 x 2 = 6 tiles + thumbnail, 63 visual tokens (9 a tile)" in shown
    )
    assert "32.5 positions at increment 0.5" in shown
    assert "thumbnail    9 tokens, positions 27.5 to 31.5" in shown


def test_positions_are_written_exactly(picture: Path):
    layout = lay_out(picture, TilingConfig(tile_px=448, max_tiles=40), increment=2.0**-8)
    assert layout.tiles[1].positions == "1.00390625 to 2"


def test_the_picture_is_never_overwritten(picture: Path, capsys: pytest.CaptureFixture[str]):
    before = picture.read_bytes()
    assert main(["show", str(picture), "--out", str(picture)]) == 2
    assert "would overwrite the picture" in capsys.readouterr().err
    assert picture.read_bytes() == before


@pytest.mark.parametrize("name", ["$a$ 图.png", "x" * 200 + ".png"])
def test_names_that_the_font_or_the_page_cannot_hold_are_no_trouble(picture: Path, name: str):
    other = picture.rename(picture.with_name(name))
    draw(lay_out(other, TilingConfig(tile_px=84, max_tiles=1)), picture.with_name("out.png"))


def test_a_tall_picture_and_many_tiles_stay_on_a_page(tmp_path: Path):
    PIL.Image.new("RGB", (28, 1120)).save(tmp_path / "tall.png")
    layout = lay_out(tmp_path / "tall.png", TilingConfig(tile_px=28, max_tiles=40))
    assert (layout.columns, layout.rows) == (1, 40)
    draw(layout, tmp_path / "out.png")
    with PIL.Image.open(tmp_path / "out.png") as image:
        assert max(image.size) < 5500


def test_one_tile_has_no_thumbnail(picture: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["show", str(picture), "--max-tiles", "1"]) == 0
    assert ", 1 tile, 256 visual tokens" in capsys.readouterr().out


def test_files_that_are_no_picture_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "text.png").write_text("no picture")
    assert main(["show", str(tmp_path / "text.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the picture ")
    assert error.count("text.png") == 1
    assert main(["show", str(tmp_path / "absent.png")]) == 2
    assert "absent.png" in capsys.readouterr().err
