"""The data check counts what is there, what is broken, and how large it is."""

from __future__ import annotations

import json

import PIL.Image
import pytest

from cascadevl.data.check import CheckReport, Histogram, check
from cascadevl.data.tiling import TilingConfig
from cascadevl.errors import DataError

TILING = TilingConfig(tile_px=28, max_tiles=12)


def chat(question, answer="fine", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **more}


@pytest.fixture
def meta(tmp_path):
    """Two data sets: pictures of known shapes with seven kinds of trouble, and plain text."""
    for name, size in {"wide": (280, 28), "square": (20, 20), "two": (56, 28)}.items():
        PIL.Image.effect_noise(size, 50.0).convert("RGB").save(tmp_path / f"{name}.png")
    whole = (tmp_path / "wide.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(5):
        PIL.Image.new("RGB", (8, 8)).save(frames / f"{number}.png")
    pictures = [
        chat("<image> x", image="wide.png"),  # 10 tiles and a thumbnail
        chat("<image> x", image="square.png"),  # 1 tile
        chat("x", image=["wide.png", "two.png"]),  # at most 6 each: 6 + 1 and 2 + 1
        chat("<video> x", video="frames"),
        chat("<image> x", image="cut.png"),  # its header is whole
        chat("<image> x", image="text.png"),
        chat("<image> x", image="nowhere.png"),
        chat("<image><image>", image="wide.png"),
        chat("x", image="s3://bucket/a.png"),
        chat("<video> x", video="nowhere.mp4"),
        chat("x", answer=""),
    ]
    lines = [json.dumps(line) for line in pictures] + ['{"conversations": [],}']
    (tmp_path / "pictures.jsonl").write_text("\n".join(lines))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps(chat("a" * n)) for n in (1, 2, 3, 9)))
    (tmp_path / "meta.json").write_text(
        json.dumps(
            {
                "pictures": {"annotation": "pictures.jsonl", "repeat_time": 2},
                "text": {"annotation": "text.jsonl", "repeat_time": 0.75},
                "few tiles": {
                    "annotation": "pictures.jsonl",
                    "max_dynamic_patch": 4,
                    "repeat_time": 0.1,
                },
            }
        )
    )
    return tmp_path / "meta.json"


def kinds(report):
    return {problem.kind: problem.count for problem in report.problems}


def test_counts_problems_and_tiles_from_headers(meta):
    report = check(meta, tiling=TILING, max_frames=4)
    assert isinstance(report, CheckReport)
    pictures, text, few = report.datasets
    assert (pictures.name, pictures.num_records, pictures.num_draws, pictures.num_good) == (
        "pictures",
        12,
        24,
        5,
    )
    assert kinds(pictures) == {
        "unsupported_image": 1,
        "missing_image": 1,
        "image_count": 1,
        "unsupported_source": 1,
        "missing_video": 1,
        "bad_field": 1,
        "invalid_json": 1,
    }
    assert dict(pictures.tiles.counts) == {1: 1, 4: 1, 10: 1, 11: 2}
    assert (pictures.num_images, pictures.num_videos, pictures.tokens) == (5, 1, None)
    assert (text.num_records, text.num_draws, text.num_good) == (3, 3, 3)
    assert dict(text.tiles.counts) == {0: 3}
    assert dict(few.tiles.counts) == {5: 1}
    assert report.num_bad == 7
    messages = [message for problem in pictures.problems for message in problem.messages]
    assert any(f"{meta.parent / 'pictures.jsonl'}:8: " in message for message in messages)


def test_deep_check_decodes_everything(meta):
    shallow, deep = (check(meta, tiling=TILING, deep=deep).datasets[0] for deep in (False, True))
    assert kinds(deep) == {**kinds(shallow), "corrupt_image": 1}
    assert deep.num_good == shallow.num_good - 1


def test_measure_counts_tokens_and_the_limit_is_kept(meta):
    def measure(record):
        length = len(record.messages[0].text)
        if length == 2:
            raise DataError("nothing of two letters", kind="odd", source=record.source)
        return length * 100, 3

    text = check(meta, tiling=TILING, measure=measure, max_tokens=200).datasets[1]
    assert dict(text.tokens.counts) == {100: 1}
    assert dict(text.tiles.counts) == {3: 1}
    assert kinds(text) == {"odd": 1, "too_long": 1}
    long = next(problem for problem in text.problems if problem.kind == "too_long")
    assert "text.jsonl:3: the record has 300 tokens, the limit is 200" in long.messages[0]
    assert (
        check(meta, tiling=TILING, measure=lambda record: (200, 0), max_tokens=200)
        .datasets[1]
        .num_good
        == 3
    )


def test_only_the_first_messages_of_a_kind_are_kept(tmp_path):
    lines = [json.dumps(chat("x", image=f"no{n}.png")) for n in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "meta.json").write_text(json.dumps({"a": {"annotation": "a.jsonl"}}))
    seen = []
    report = check(
        tmp_path / "meta.json",
        tiling=TILING,
        max_messages=2,
        progress=lambda *step: seen.append(step),
    )
    (problem,) = report.datasets[0].problems
    assert (problem.count, len(problem.messages)) == (9, 2)
    assert ["no0" in problem.messages[0], "no1" in problem.messages[1]] == [True, True]
    assert seen == [("a", n + 1, 9) for n in range(9)]


def test_histogram():
    histogram = Histogram.of({5: 1, 1: 3, 9: 4})
    assert list(histogram.counts) == [1, 5, 9]
    assert (histogram.total, histogram.mean) == (8, (3 + 5 + 36) / 8)
    assert [histogram.quantile(share) for share in (0.0, 0.375, 0.5, 0.51, 1.0)] == [1, 1, 5, 9, 9]
    assert histogram.bins((0, 5, 9)) == [3, 1, 4]
    assert histogram.bins((2, 6)) == [1, 4]
    assert (
        Histogram.of({}).mean,
        Histogram.of({}).quantile(0.5),
        Histogram.of({}).bins((0, 1)),
    ) == (0.0, 0, [0, 0])
