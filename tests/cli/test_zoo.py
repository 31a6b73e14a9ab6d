from __future__ import annotations

import re
from pathlib import Path

import pytest

from cascadevl.cli.main import main
from cascadevl.model.zoo import ZOO

CONFIGS = Path(__file__).parents[2] / "configs"


def test_every_released_size_is_listed_on_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["zoo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for model in ZOO.values():
        (line,) = (line for line in lines if line.split() and line.split()[0] == model.name)
        assert model.vision in line
        assert model.language in line
        if model.report_billion is not None:
            assert f"{model.report_billion:g} B" in line
    flash = next(line for line in lines if line.startswith("InternVL3.5-8B-Flash"))
    assert "8.8 B" in flash  # 8.5 of the plain one, 0.24 of the projector, 0.05 of the router


def test_a_flash_size_in_full(capsys: pytest.CaptureFixture[str]):
    assert main(["zoo", "internvl3_5-38b-flash"]) == 0
    shown = capsys.readouterr().out
    for fact in (
        "OpenGVLab/InternVL3_5-38B-Flash",
        "256 or 64, as the router decides",
        "64 x 5120",
    ):
        assert fact in shown
    assert "training runs" not in shown


def test_one_size_in_full(capsys: pytest.CaptureFixture[str]):
    assert main(["zoo", "internvl3.5-30B-a3b"]) == 0
    shown = capsys.readouterr().out
    for fact in (
        "InternVL3.5-30B-A3B",
        "OpenGVLab/InternVL3_5-30B-A3B",
        "3 B of them",
        "48 x 2048",
        "configs/*_30b-a3b.yaml",
    ):
        assert fact in shown


def test_the_runs_it_names_are_there(capsys: pytest.CaptureFixture[str]):
    for model in ZOO.values():
        assert main(["zoo", model.name]) == 0
        shown = capsys.readouterr().out
        patterns = re.findall(r"configs/(\S+\.yaml)", shown)
        assert len(patterns) == (model.preset is not None)
        for pattern in patterns:
            stages = {file.name.partition("_")[0] for file in CONFIGS.glob(pattern)}
            assert {"pretrain", "sft"} <= stages


def test_an_unknown_size_names_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert main(["zoo", "InternVL3.5-8"]) == 2
    assert "did you mean 'InternVL3.5-8B'?" in capsys.readouterr().err
