"""``cascadevl show --router``: the routes that the engine takes, drawn and told."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from tests.train.small_run import tokenizer

import cascadevl
from cascadevl.cli.main import main
from cascadevl.data.tiling import normalise
from cascadevl.model.flash import add_flash
from cascadevl.model.loading import save
from cascadevl.model.routing import KeepShare
from cascadevl.train.config import ModelConfig
from cascadevl.train.start import from_scratch
from cascadevl.types import ImageRef, Message
from cascadevl.workflows.show_drawing import draw
from cascadevl.workflows.show_router import lay_out_routed

PX = 112
ORANGE = (217, 119, 6)


def write_flash(folder: Path, threshold: float | None) -> Path:
    """A nano with a router that tells tiles apart."""
    model, processor = from_scratch(ModelConfig(preset="nano"), tokenizer(), seed=3)
    add_flash(model, seed=4)
    assert model.model.router is not None
    with torch.no_grad():
        for parameter in model.model.router.parameters():
            parameter.mul_(6)
    model.config.flash_absolute_threshold = threshold
    save(model, processor, folder)
    return folder


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flash(tmp_path_factory.mktemp("flash") / "model", None)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two by two tiles, each with as much noise as its number says."""
    path = tmp_path_factory.mktemp("picture") / "four.png"
    generator = np.random.default_rng(0)
    pixels = np.full((2 * PX, 2 * PX, 3), 120, dtype=np.uint8)
    for tile in range(4):
        row, column = divmod(tile, 2)
        noise = generator.integers(0, 1 + 40 * tile, size=(PX, PX, 3))
        pixels[row * PX : (row + 1) * PX, column * PX : (column + 1) * PX] += noise.astype(np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return path


def probabilities_of(flash: Path, picture: Path) -> list[float]:
    """What the router says of the tiles of a prompt with the picture."""
    model, processor = cascadevl.load(flash)
    example = processor.builder.prompt([Message.of("user", ImageRef(picture), "?")])
    with torch.no_grad():
        found = model.encode_images(normalise(example.tiles)).compress
    assert found is not None
    return found.float().tolist()


def test_the_command_tells_every_tile(
    flash: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = picture.with_name("out.png")
    words = ["--router", str(flash), "--visual-budget", "40%", "--out", str(out)]
    assert main(["show", str(picture), *words]) == 0
    shown = capsys.readouterr().out
    assert "2 x 2 = 4 tiles + thumbnail, 44 visual tokens (16 a tile, 36 saved)" in shown
    found = re.findall(r"(\d+) tokens, .* (full|compressed) \(probability ([\d.]+)\)", shown)
    wanted = probabilities_of(flash, picture)
    assert [float(p) for *_, p in found] == pytest.approx(wanted, abs=6e-4)
    kept = sorted(range(5), key=lambda tile: wanted[tile])[:2]
    assert [verdict == "full" for _, verdict, _ in found] == [tile in kept for tile in range(5)]
    assert [int(n) for n, *_ in found] == [16 if tile in kept else 4 for tile in range(5)]
    with PIL.Image.open(out) as image:
        assert image.format == "PNG"


def test_positions_follow_the_shorter_tiles(flash: Path, picture: Path) -> None:
    layout = lay_out_routed(picture, flash, budget=KeepShare(0.4), increment=0.5)
    start = 0.5
    for tile in layout.tiles:
        assert tile.first_position == start
        start += tile.num_tokens * 0.5
        assert tile.last_position == start - 0.5
    assert layout.length == 44 * 0.5 + 1


def test_compressed_tiles_are_painted(flash: Path, picture: Path, tmp_path: Path) -> None:
    def orange(budget: str) -> int:
        draw(lay_out_routed(picture, flash, budget=budget), tmp_path / f"{budget}.png")  # type: ignore[arg-type]
        with PIL.Image.open(tmp_path / f"{budget}.png") as image:
            return int((np.asarray(image.convert("RGB")) == ORANGE).all(-1).sum())

    assert orange("full") == 0
    assert orange("compressed") > 5000


def test_the_models_own_threshold_decides_unless_a_budget_does(
    flash: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    middle = sorted(probabilities_of(flash, picture))[2]
    own = write_flash(tmp_path / "own", middle)
    assert sum(t.is_compressed for t in lay_out_routed(picture, own).tiles) == 3
    assert sum(t.is_compressed for t in lay_out_routed(picture, flash).tiles) == 0
    assert main(["show", str(picture), "--router", str(own), "--max-tiles", "1"]) == 0
    assert ", 1 tile, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--router", "micro"], "has no router"),
        (["--router", "FLASH", "--tile-px", "28"], "are the model's"),
        (["--visual-budget", "50%"], "name a Flash model with --router"),
        (["--router", "FLASH", "--visual-budget", "much"], "'much' is no visual budget"),
    ],
)
def test_what_does_not_go_together_is_refused(
    flash: Path,
    picture: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    words = [str(flash) if word == "FLASH" else word for word in words]
    assert main(["show", str(picture), *words]) == 2
    assert message in capsys.readouterr().err
