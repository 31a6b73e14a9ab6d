"""A demo of a Flash model shows which tiles it compressed; that of a plain model does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from rich.console import Console
from tests.eval.page import Page
from tests.train.small_run import tokenizer
from tests.workflows.small_demo import small_demo

from cascadevl.data.tiling import tile_image
from cascadevl.eval.report import Report, StageScores
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import run_suite
from cascadevl.eval.suite import SuiteRow
from cascadevl.eval.tile_routes import COMPRESSED_COLOUR, TileRoutes, painted, route_tiles
from cascadevl.model.flash import add_flash
from cascadevl.model.loading import load, save
from cascadevl.tasks.naming import task_named
from cascadevl.train.config import ModelConfig
from cascadevl.train.start import from_scratch
from cascadevl.workflows.demonstration import finish

ROWS = [SuiteRow(name="shapes", task=task_named("shapes:full", px=224), num_questions=4)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A plain nano and a Flash one, whose router tells tiles apart."""
    folder = tmp_path_factory.mktemp("models")
    model, processor = from_scratch(ModelConfig(preset="nano"), tokenizer(), seed=3)
    save(model, processor, folder / "plain")
    add_flash(model, seed=4)
    assert model.model.router is not None
    with torch.no_grad():
        for parameter in model.model.router.parameters():
            parameter.mul_(6)
    model.config.flash_absolute_threshold = 0.5
    save(model, processor, folder / "flash")
    return folder / "plain", folder / "flash"


def page_of(trained: Path, out: Path) -> tuple[Page, str]:
    """The report of a demo that ends with this model."""
    model, processor = load(trained)
    responder = ModelResponder(model=model, processor=processor, max_new_tokens=4)
    scores = run_suite(responder, ROWS, seed=2)
    demo = small_demo(out, processor, ROWS, Console(quiet=True))
    demo.stages.append(StageScores(name="end", scores=scores))
    path = finish(
        demo,
        trained,
        lambda commands: Report(title="t", lead="l", stages=demo.stages, commands=commands),
    )
    text = path.read_text("utf-8")
    return Page(text), text


def test_a_reader_sees_which_tiles_were_compressed(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    page, text = page_of(models[1], tmp_path / "out")
    assert "Which tiles were compressed" in text
    told = page.of("div", "routes")
    assert len(told) == 3
    pictures = [image for kind, image in page.images if not kind]
    assert len(pictures) == 4 + 3  # the gallery of answers, then that of routes
    for words, shown in zip(told, pictures[4:], strict=True):
        number, *_ = words.split()
        orange = (np.abs(np.asarray(shown, dtype=int) - COMPRESSED_COLOUR).max(-1) < 3).sum()
        assert (orange > 0) == (int(number) > 0)
    numbers = [int(words.split()[0]) for words in told]
    assert all("tiles compressed" in words for words in told)
    assert any(numbers)


def test_a_plain_model_has_no_such_part(models: tuple[Path, Path], tmp_path: Path) -> None:
    _, text = page_of(models[0], tmp_path / "out")
    assert "Which tiles were compressed" not in text


def test_compressed_tiles_lie_under_a_veil() -> None:
    picture = PIL.Image.new("RGB", (200, 100), (255, 255, 255))
    routes = TileRoutes(probabilities=(0.9, 0.2, 0.7), tokens_per_tile=(4, 16, 4), full_tokens=16)
    assert routes.words == "2 of 3 tiles compressed, 24 of 48 visual tokens saved"
    shown = np.asarray(painted(picture, 2, 1, routes), dtype=int)
    assert shown.shape[0] > 100  # a line for the thumbnail
    left, right = shown[60, 50], shown[60, 150]
    assert (right == 255).all()
    assert left.tolist() == [239, 196, 148]  # white and (217, 119, 6) at 110 of 255
    assert (shown[100:] != 255).any()
    assert np.asarray(picture).min() == 255  # the picture itself is left alone


def test_tiles_are_routed_as_a_request_is(models: tuple[Path, Path]) -> None:
    model, processor = load(models[1])
    asked = ROWS[0].task.draw("test", 0, 0)
    assert asked.image is not None

    tiles = tile_image(asked.image, processor.tiling)
    routes = route_tiles(model, tiles)
    wanted = [p >= 0.5 for p in routes.probabilities]
    assert list(routes.compressed) == wanted
    assert len(tiles) == 5
