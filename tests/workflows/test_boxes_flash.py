"""The end of micro's demo: a copy that compresses tiles, and the page that shows which."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests.eval.page import Page
from tests.workflows.small_demo import small_demo
from tests.workflows.small_nano import save_small

from cascadevl.data.tiling import tile_image
from cascadevl.errors import TrainingError
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import run_suite
from cascadevl.eval.suite import SuiteRow
from cascadevl.eval.tile_routes import RoutedAnswer, TileRoutes, route_tiles
from cascadevl.model.flash import add_flash
from cascadevl.model.loading import load, save
from cascadevl.tasks.naming import task_named
from cascadevl.workflows import boxes, boxes_flash, demonstration
from cascadevl.workflows.demonstration import Demonstration, examine

SCALE = 0.02
ROWS = [
    SuiteRow(name="small", task=task_named("handwriting:four", px=112), num_questions=3),
    SuiteRow(name="large", task=task_named("charts:easy", px=224), num_questions=3),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("start") / "model")


def demo_of(model: Path, out: Path) -> Demonstration:
    """A demo that has come to the end of its lesson."""
    loaded, processor = load(model, dtype=torch.bfloat16)
    demo = small_demo(out, processor, ROWS, Console(file=io.StringIO(), width=80))
    examine(demo, "GSPO", loaded)
    return demo


def compress(demo: Demonstration, model: Path) -> Path | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boxes, "ROW_TOKENS", 1024)
        return boxes_flash.compress(demo, model, steps_scale=SCALE)


@pytest.fixture(scope="module")
def finished(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Demonstration:
    demo = demo_of(start, tmp_path_factory.mktemp("demo") / "run")
    assert compress(demo, start) == demo.out / "compressed.html"
    return demo


def test_the_copy_compresses_tiles_and_the_model_is_left_alone(
    start: Path, finished: Demonstration
) -> None:
    before, _ = load(start)
    model, _ = load(finished.out / "flash")
    assert not before.config.flash_mode
    assert model.config.flash_mode
    assert model.config.flash_absolute_threshold is not None
    old, new = before.state_dict(), model.state_dict()
    assert any(not torch.equal(old[name], new[name]) for name in old)
    assert [stage.name for stage in finished.stages] == ["GSPO"]


def test_the_page_has_the_scores_of_all_three_and_the_tiles(
    finished: Demonstration,
) -> None:
    page = Page((finished.out / "compressed.html").read_text("utf-8"))
    assert page.rows[0][3:] == ["all tiles full", "all compressed", "router", "change, in points"]
    told = page.of("div", "routes")
    assert len(told) == 2 * boxes_flash.SHOWN
    assert [words.split()[2] for words in told] == ["5"] * 3 + ["1"] * 3
    assert len(page.images) == len(told)  # no gallery of answers beside it
    assert {"vico", "router", "visual tokens"} <= set(page.of("dt"))
    threshold = load(finished.out / "flash")[0].config.flash_absolute_threshold
    assert threshold is not None
    assert f"a probability of {threshold:.0%} or more" in page.of("p", "lead")[0]


@pytest.mark.parametrize(("budget", "place"), [("compressed", 1), (None, 2)])
def test_the_columns_are_what_the_copy_answers_with_that_budget(
    finished: Demonstration, budget: str | None, place: int
) -> None:
    model, processor = load(finished.out / "flash", dtype=torch.bfloat16)
    responder = ModelResponder(
        model=model,
        processor=processor,
        max_new_tokens=4,
        visual_budget=None if budget is None else "compressed",
    )
    scores = run_suite(responder, ROWS, seed=demonstration.EXAM_SEED)
    page = Page((finished.out / "compressed.html").read_text("utf-8"))
    for row, score in zip(page.rows[1:], scores, strict=True):
        assert row[3 + place].split()[0] == f"{100 * score.estimate.value:.1f}"


def test_the_tokens_that_are_left_are_counted(finished: Demonstration) -> None:
    model, processor = load(finished.out / "flash", dtype=torch.bfloat16)
    tokens, tiles, whole = 0, 0, 0
    for score in finished.stages[0].scores:
        for answered in score.answered:
            assert answered.asked.scene.image is not None
            cut = tile_image(answered.asked.scene.image, processor.tiling)
            routes = route_tiles(model, cut)
            tokens += sum(routes.tokens_per_tile)
            whole += routes.full_tokens * len(cut)
            tiles += len(cut)
    said = finished.facts["visual tokens"]
    assert said.startswith(f"{100 * tokens / whole:.0f} % are left")
    assert f"of {tiles} tiles (of 6 questions)" in said


def test_an_interrupted_end_goes_on(
    start: Path, finished: Demonstration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after consistency, before the router: the same call ends with the same weights."""

    def stop(*args: object, **settings: object) -> None:
        raise TrainingError("stopped")

    demo = demo_of(start, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(boxes_flash, "router", stop)
        with pytest.raises(TrainingError, match="stopped"):
            compress(demo, start)
    assert not (demo.out / "compressed.html").exists()
    compress(demo_of(start, tmp_path / "run"), start)
    one, other = (
        (each / "flash" / "model.safetensors").read_bytes() for each in (finished.out, demo.out)
    )
    assert one == other


def test_a_model_that_compresses_already_is_left_as_it_is(start: Path, tmp_path: Path) -> None:
    model, processor = load(start)
    add_flash(model, seed=1, num_heads=2)
    save(model, processor, tmp_path / "flash")
    demo = demo_of(start, tmp_path / "run")
    assert boxes_flash.compress(demo, tmp_path / "flash", steps_scale=SCALE) is None
    assert not (demo.out / "vico").exists()


def test_a_few_of_each_row_are_shown_those_of_most_tiles_first(finished: Demonstration) -> None:
    answered = finished.stages[0].scores[0].answered[0]

    def routed(row: str, tiles: int) -> RoutedAnswer:
        routes = TileRoutes(
            probabilities=(0.5,) * tiles, tokens_per_tile=(4,) * tiles, full_tokens=16
        )
        return RoutedAnswer(row=row, answered=answered, columns=1, rows=1, routes=routes)

    found = [routed("a", 1), *(routed("b", tiles) for tiles in (5, 4, 3, 7))]
    shown = boxes_flash.to_show(found)
    assert [(each.row, len(each.routes.compressed)) for each in shown] == [
        ("b", 5),
        ("b", 4),
        ("b", 3),
        ("a", 1),
    ]
    assert boxes_flash.tokens_left(found).startswith("25 % are left")
    half = replace(found[0], routes=replace(found[0].routes, tokens_per_tile=(16,)))
    assert boxes_flash.tokens_left([half, found[0]]).startswith("62 % are left")
