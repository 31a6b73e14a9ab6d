from __future__ import annotations

import io
import json
from pathlib import Path

import PIL.Image
import pytest
from rich.console import Console

from cascadevl.cli.data import bin_edges, print_report
from cascadevl.cli.main import main
from cascadevl.data.check import CheckReport, DatasetReport, Histogram, Problem


def turn(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    """Three good records (a wide picture, a square one, text) and two broken ones."""
    PIL.Image.new("RGB", (448, 448)).save(tmp_path / "square.png")
    PIL.Image.new("RGB", (1344, 448)).save(tmp_path / "wide.png")
    lines = [
        {"id": 0, "image": "wide.png", "conversations": turn("<image>\nwhat?")},
        {"id": 1, "image": "square.png", "conversations": turn("<image>\nwhat?")},
        {"id": 2, "conversations": turn("hi")},
        {"id": 3, "image": "absent.png", "conversations": turn("<image>\nwhat?")},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"id": 4,}\n'
    (tmp_path / "some.jsonl").write_text(text)
    entry = {"root": str(tmp_path), "annotation": str(tmp_path / "some.jsonl"), "length": 5}
    entry |= {"data_augment": False, "repeat_time": 1}
    (tmp_path / "meta.json").write_text(json.dumps({"some": entry}))
    return tmp_path / "meta.json"


def test_broken_records_are_named_and_the_others_measured(
    meta: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["data", "check", str(meta)]) == 1
    shown = capsys.readouterr().out
    assert "some.jsonl:4" in shown
    assert "absent.png" in shown
    assert "some.jsonl:5" in shown
    assert "2 of 5 records are broken" in shown
    # 3 x 1 tiles and a thumbnail, one tile, none
    assert "tiles of a record (least 0, median 1, mean 1.7, most 4)" in shown
    assert [line.split()[0] for line in shown.splitlines() if "█" in line] == ["0", "1", "4"]


def test_fewer_tiles_can_be_asked_for(meta: Path, capsys: pytest.CaptureFixture[str]):
    main(["data", "check", str(meta), "--max-tiles", "2"])
    assert "most 3)" in capsys.readouterr().out


def test_good_data_ends_with_0(meta: Path, capsys: pytest.CaptureFixture[str]):
    annotation = meta.with_name("some.jsonl")
    annotation.write_text("\n".join(annotation.read_text().splitlines()[:3]) + "\n")
    assert main(["data", "check", str(meta)]) == 0
    assert "all 3 records can be used" in capsys.readouterr().out


def test_tokens_need_a_model(meta: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "check", str(meta), "--max-tokens", "100"]) == 2
    assert "need --model" in capsys.readouterr().err


def test_a_missing_meta_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "check", str(tmp_path / "absent.json")]) == 2
    assert "absent.json" in capsys.readouterr().err


def test_the_report_shows_all_that_was_found():
    entry = DatasetReport(
        name="boxes",
        num_records=1200,
        num_draws=2400,
        num_good=1100,
        num_images=1500,
        num_videos=7,
        problems=(Problem(kind="image_count", count=100, messages=("a.jsonl:3: [two] marks",)),),
        tiles=Histogram.of({1: 1000, 13: 100}),
        tokens=Histogram.of({10: 500, 11: 250, 1000: 350}),
    )
    console = Console(file=io.StringIO(), width=160)
    print_report(CheckReport(meta=Path("m.json"), datasets=(entry,)), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    row = next(line for line in shown.splitlines() if "1,200" in line)
    for number in ("boxes", "1,200", "1,100", "100", "2,400", "1,500", "7"):
        assert f" {number} " in row
    assert "boxes: 100 x image_count" in shown
    assert "  a.jsonl:3: [two] marks" in shown
    assert "and 99 more" in shown
    assert "tokens of a record (least 10, median 11, mean" in shown
    assert shown.count("█" * 40 + " 1,000") == 1
    assert "█" * 40 + " 750" in shown  # 10 and 11 share a bin


@pytest.mark.parametrize(("low", "high"), [(0, 0), (1, 13), (5, 16), (0, 1000), (7, 19)])
def test_bins_are_few_equal_and_cover_everything(low: int, high: int):
    edges = bin_edges(low, high)
    width = edges[1] - edges[0] if len(edges) > 1 else high - low + 1
    assert edges == tuple(low + width * index for index in range(len(edges)))
    assert edges[-1] <= high < edges[-1] + width
    assert len(edges) <= 12
