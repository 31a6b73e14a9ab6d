"""The page read back by a parser: its numbers, its pictures, and text that stays text."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from tests.eval.page import Page
from tests.eval.small_suite import NUM, SEED, Scripted, reference, suite, wrong

from cascadevl.eval.box_drawing import with_boxes
from cascadevl.eval.report import (
    Curve,
    Plot,
    Report,
    StageScores,
    change,
    draw,
    percent,
    smoothed,
    write_report,
)
from cascadevl.eval.runner import run_suite
from cascadevl.eval.suite import Asked, SuiteRow
from cascadevl.scoring.metrics import Estimate
from cascadevl.tasks.grounding import Grounding

MARKUP = '<b>12</b> & "a" <script>alert(1)</script>'


def markup(asked: Asked) -> str:
    """Right in text and shapes, and a mischievous answer elsewhere."""
    return MARKUP if asked.row in ("numbers", "easy-VQA") else reference(asked)


@pytest.fixture(scope="module")
def stages() -> list[StageScores]:
    rules = {"untrained": wrong, "after pretrain": markup, "after sft": reference}
    return [
        StageScores(name=name, scores=run_suite(Scripted(rule), suite(), seed=SEED))
        for name, rule in rules.items()
    ]


def rendered(stages: list[StageScores], folder: Path, **values: object) -> Page:
    report = Report(title="T <1>", lead="lead", stages=stages, **values)  # type: ignore[arg-type]
    write_report(report, folder / "new" / "report.html")
    return Page((folder / "new" / "report.html").read_text("utf-8"))


def test_the_table_holds_the_scores(stages: list[StageScores], tmp_path: Path) -> None:
    head, *rows = rendered(stages, tmp_path).rows
    assert head[-3:] == ["untrained", "after pretrain", "after sft"]
    assert len(rows) == len(suite())
    for number, row in enumerate(rows):
        scores = [stage.scores[number] for stage in stages]
        first = scores[0]
        assert row[:2] == [first.row, str(NUM)]
        assert row[2] == f"{100 * first.baseline.share:.1f} “{first.baseline.answer}”"
        for cell, score in zip(row[3:], scores, strict=True):
            value, low, to, high = cell.split()
            assert float(value) == pytest.approx(100 * score.estimate.value, abs=0.05)
            assert (float(low), to) == (pytest.approx(100 * score.estimate.low, abs=0.5), "to")
            assert float(high) == pytest.approx(100 * score.estimate.high, abs=0.5)
    assert [row[-1].split()[0] for row in rows] == ["100.0"] * len(suite())


def test_percent_is_worded_for_people() -> None:
    assert percent(Estimate(value=0.8425, low=0.803, high=0.876, num=400)) == ("84.2", "80 to 88")


def test_cards_show_picture_question_answer_and_truth(
    stages: list[StageScores], tmp_path: Path
) -> None:
    page = rendered(stages[:1], tmp_path, num_pictures=3)
    answers = [each for score in stages[0].scores for each in score.answered[:3]]
    assert page.of("b", "bad") == ["✗ I cannot see that."] * len(answers)
    assert page.of("b", "good") == []
    assert page.of("div", "truth") == [f"truth: {each.asked.question.answer}" for each in answers]
    prompts = [each.asked.question.prompt for each in answers]
    assert [text for text in page.of("div") if text in prompts] == prompts
    pictures = [each.asked.scene.image for each in answers if each.asked.scene.image is not None]
    assert len(page.images) == len(pictures) == 12  # texts have none
    for (_, shown), picture in zip(page.images, pictures, strict=True):
        assert shown.width == 224
        back = np.asarray(shown.resize(picture.size, PIL.Image.Resampling.BOX), dtype=np.float64)
        assert np.abs(back - np.asarray(picture, dtype=np.float64)).mean() < 3


def test_the_last_stage_is_the_one_shown(stages: list[StageScores], tmp_path: Path) -> None:
    page = rendered(stages, tmp_path, num_pictures=2)
    assert page.of("b", "bad") == []
    assert len(page.of("b", "good")) == 2 * len(suite())


def test_a_mistake_is_shown_where_there_is_one(tmp_path: Path) -> None:
    right = iter(range(1000))
    scores = run_suite(
        Scripted(lambda asked: reference(asked) if next(right) < 7 else wrong(asked), suite()[:1]),
        suite()[:1],
        seed=SEED,
    )
    page = rendered([StageScores(name="s", scores=scores)], tmp_path, num_pictures=4)
    assert len(page.of("b", "good")) == 3
    assert page.of("b", "bad") == ["✗ I cannot see that."]
    assert page.of("div", "truth") == [f"truth: {scores[0].answered[7].asked.question.answer}"]


def test_answers_are_text_and_not_markup(stages: list[StageScores], tmp_path: Path) -> None:
    page = rendered(
        stages[:2], tmp_path, facts={"<i>key</i>": "<i>value</i>"}, commands="a < b > c"
    )
    assert f"✗ {MARKUP}" in page.of("b", "bad")
    assert "script" not in page.tags
    assert "i" not in page.tags
    assert page.of("dt") == ["<i>key</i>"]
    assert page.of("dd") == ["<i>value</i>"]
    assert page.of("pre") == ["a < b > c"]
    assert page.of("h1") == ["T <1>"]


def test_an_empty_answer_is_named(tmp_path: Path) -> None:
    scores = run_suite(Scripted(lambda _: "", suite()[:1]), suite()[:1], seed=SEED)
    page = rendered([StageScores(name="s", scores=scores)], tmp_path, num_pictures=1)
    assert page.of("b", "bad") == ["✗ (nothing)"]


def test_the_page_stands_alone(stages: list[StageScores], tmp_path: Path) -> None:
    page = rendered(stages, tmp_path)
    assert page.links
    assert all(link.startswith("data:") for link in page.links)
    assert "link" not in page.tags


def test_plots_are_embedded_with_their_notes(stages: list[StageScores], tmp_path: Path) -> None:
    curves = [Curve(name="a", steps=[1, 2, 3], values=[0.0, 50.0, 100.0])]
    plots = [Plot(title="Up", curves=curves, y_label="y", note="a note", marks=[2])]
    page = rendered(stages[:1], tmp_path, plots=plots)
    (plot,) = [image for kind, image in page.images if kind == "plot"]
    direct = PIL.Image.open(io.BytesIO(draw(plots[0]))).convert("RGB")
    assert (np.asarray(plot) == np.asarray(direct)).all()
    assert "a note" in page.of("p", "lead")


def pixels_of(plot: Plot, colour: tuple[int, int, int]) -> np.ndarray:
    pixels = np.asarray(PIL.Image.open(io.BytesIO(draw(plot))).convert("RGB"), dtype=np.int64)
    return np.argwhere((np.abs(pixels - colour) < 12).all(axis=2))


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)
"""The first two colours of matplotlib's cycle."""


def test_curves_are_drawn() -> None:
    rising = Curve(name="up", steps=[0, 10], values=[0.0, 1.0])
    falling = Curve(name="down", steps=[0, 10], values=[1.0, 0.0])
    plot = Plot(title="t", curves=[rising, falling], y_label="y")
    for colour, direction in ((BLUE, -1), (ORANGE, 1)):  # rows of a picture count downwards
        found = pixels_of(plot, colour)
        found = found[found[:, 1] < 700]  # without the legend
        assert len(found) > 300
        assert np.corrcoef(found[:, 0], found[:, 1])[0, 1] * direction > 0.9


def test_an_exponential_is_straight_on_a_logarithmic_scale() -> None:
    steps = list(range(40))
    curve = Curve(name="c", steps=steps, values=[1.2**step for step in steps])
    straight, bent = (
        np.corrcoef(*pixels_of(Plot(title="t", curves=[curve], y_label="y", log_scale=log), BLUE).T)
        for log in (True, False)
    )
    assert straight[0, 1] < -0.995
    assert bent[0, 1] > -0.95


def test_the_vertical_range_is_kept() -> None:
    """A flat line at a quarter of the range is drawn in the lower part, not in the middle."""
    flat = Curve(name="c", steps=[0, 10], values=[25.0, 25.0])
    fitted, fixed = (
        pixels_of(Plot(title="t", curves=[flat], y_label="y", y_range=ends), BLUE)[:, 0].mean()
        for ends in (None, (0.0, 100.0))
    )
    assert fixed > fitted + 50


def test_a_plot_without_curves_is_still_a_picture() -> None:
    image = PIL.Image.open(io.BytesIO(draw(Plot(title="t", curves=[], y_label="y"))))
    assert image.width > 500


def test_smoothing_by_hand() -> None:
    steps, means = smoothed(np.array([1, 2, 5, 9, 10]), np.array([3.0, 0.0, 6.0, 9.0, 0.0]), 3)
    assert steps.tolist() == [2, 5, 9]
    assert means.tolist() == pytest.approx([3.0, 5.0, 5.0])


def test_stages_of_other_rows_are_refused(stages: list[StageScores], tmp_path: Path) -> None:
    other = StageScores(name="other", scores=list(stages[0].scores[1:]))
    with pytest.raises(ValueError, match=r"stage 'other' scores other rows than \['numbers'"):
        rendered([*stages, other], tmp_path)


def test_a_report_needs_a_stage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one stage"):
        rendered([], tmp_path)


def test_a_change_has_a_direction_where_intervals_do_not_meet() -> None:
    low = Estimate(value=0.2, low=0.1, high=0.3, num=50)
    middle = Estimate(value=0.35, low=0.25, high=0.45, num=50)
    high = Estimate(value=0.62, low=0.5, high=0.7, num=50)
    assert change(low, high) == ("+42.0", "up")
    assert change(high, low) == ("-42.0", "down")
    assert change(low, middle) == ("+15.0", "open")
    assert change(low, low) == ("+0.0", "open")


def test_comparing_shows_what_changed_and_what_the_first_said(
    stages: list[StageScores], tmp_path: Path
) -> None:
    head, *rows = rendered(stages, tmp_path, compare=True).rows
    assert head[-1] == "change, in points"
    for number, row in enumerate(rows):
        ends = [stage.scores[number].estimate for stage in (stages[0], stages[-1])]
        assert row[-1] == change(*ends)[0]
    page = rendered(stages, tmp_path, compare=True, num_pictures=2)
    told = [text for text in page.of("div", "truth") if text.startswith("untrained: ✗ ")]
    assert told == ["untrained: ✗ I cannot see that."] * 2 * len(suite())
    same = rendered([stages[0], stages[0]], tmp_path, compare=True, num_pictures=2)
    assert not [text for text in same.of("div", "truth") if text.startswith("untrained")]


def test_scores_can_be_left_out(stages: list[StageScores], tmp_path: Path) -> None:
    page = rendered(stages, tmp_path, show_scores=False)
    assert page.rows == []
    assert page.of("b", "good")


def test_boxes_are_drawn_on_the_pictures(tmp_path: Path) -> None:
    row = SuiteRow(name="boxes", task=Grounding(num_questions=1), num_questions=3)
    wrong_box = "<box>[[0, 0, 40, 40]]</box>"
    scores = run_suite(Scripted(lambda _: wrong_box, [row]), [row], seed=SEED)
    page = rendered([StageScores(name="s", scores=scores)], tmp_path, num_pictures=3)
    for (_, shown), answered in zip(page.images, scores[0].answered, strict=True):
        image = answered.asked.scene.image
        assert image is not None
        large = image.resize((224, 224), PIL.Image.Resampling.BICUBIC)
        truth = answered.asked.question.answer
        assert (
            np.asarray(shown) == np.asarray(with_boxes(large, given=wrong_box, truth=truth))
        ).all()
    assert page.of("span", "given") == ["▭"]
