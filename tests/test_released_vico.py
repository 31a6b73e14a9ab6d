"""The configurations of ViCO say what the report says, and of every value whether it does."""

from __future__ import annotations

import re
from operator import attrgetter
from pathlib import Path

import pytest

from cascadevl.cli.main import make_parser
from cascadevl.cli.train import read_config
from cascadevl.data.meta import read_meta
from cascadevl.model.zoo import ZOO
from cascadevl.tasks.naming import weighted
from cascadevl.train.vico import ViCOConfig

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
TRIALS = ("nano", "micro")
SOURCE = re.compile(r"# (not published|(the )?report|ours)\b")

# Report, section on ViCO: the entire model, xi from {1/4, 1/16}, an extra frozen reference.
REPORT = {
    "model.frozen": (),
    "vico.compress": 0.5,
    "vico.reference": "copy",
    "batch.averaging": "sample",
}
# Where the report is silent: the scripts of SFT, whose data it takes.
AS_IN_SFT = {
    "model.precision": "bfloat16",
    "model.gradient_checkpointing": True,
    "model.drop_path": None,  # ours: nothing is dropped
    "data.max_tokens": 32768,
    "data.max_tiles": 12,
    "data.jpeg": True,
    "data.increment": 1.0,
    "batch.packing": "fill",
    "batch.row_tokens": 32768,
    "batch.row_tiles": 96,
    "optim.betas": (0.9, 0.999),
    "optim.weight_decay": 0.05,
    "optim.schedule": "cosine",
    "optim.warmup_ratio": 0.03,
    "run.global_batch": 512,
    "run.seed": 42,
}
STARTS = {
    "1b": "OpenGVLab/InternVL3_5-1B",
    "2b": "OpenGVLab/InternVL3_5-2B",
    "4b": "OpenGVLab/InternVL3_5-4B",
    "8b": "OpenGVLab/InternVL3_5-8B",
    "14b": "OpenGVLab/InternVL3_5-14B",
    "30b-a3b": "OpenGVLab/InternVL3_5-30B-A3B",
    "38b": "OpenGVLab/InternVL3_5-38B",
    "241b-a28b": "OpenGVLab/InternVL3_5-241B-A28B",
}


def opened(size: str) -> ViCOConfig:
    """A configuration as ``cascadevl train`` reads it."""
    words = ["train", "vico", str(CONFIGS / f"vico_{size}.yaml")]
    config = read_config(make_parser().parse_args(words))
    assert isinstance(config, ViCOConfig)
    return config


@pytest.mark.parametrize("size", STARTS)
def test_vico_of_internvl3_5(size: str) -> None:
    config = opened(size)
    expected = {**REPORT, **AS_IN_SFT, "model.path": STARTS[size]}
    found = {key: attrgetter(key)(config) for key in expected}
    assert found == expected
    assert config.run.out == Path("runs") / f"vico_{size}"


def test_the_sizes_are_those_with_a_flash_model_in_zoo_or_report() -> None:
    """Table 17 has a Flash model of 241B-A28B; it was not released."""
    flash = {name.removesuffix("-Flash") for name in ZOO if name.endswith("-Flash")}
    sizes = {ZOO[name].preset for name in flash} | {"241b-a28b"}
    assert set(STARTS) == sizes
    files = {file.stem.removeprefix("vico_") for file in CONFIGS.glob("vico_*.yaml")}
    assert files == sizes | set(TRIALS)
    assert {model.hub_id for model in ZOO.values()} >= set(STARTS.values())


@pytest.mark.parametrize("preset", TRIALS)
def test_our_presets_keep_to_the_report_and_name_data_that_exist(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = opened(preset)
    assert {key: attrgetter(key)(config) for key in REPORT} == REPORT
    sources = [weighted(spec) for path in config.data.meta for spec in read_meta(path)]
    assert len(sources) >= 4
    for source in sources:
        assert source.source[0].branches  # type: ignore[index]


def test_every_value_has_its_source_beside_it() -> None:
    files = [*CONFIGS.glob("vico_*.yaml"), *(CONFIGS / "bases").glob("vico_*.yaml")]
    assert len(files) >= 9
    for file in files:
        if file.stem.removeprefix("vico_") in TRIALS:
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition("#")[0].partition(":")
            if not value.strip() or key.strip() in ("base", "out"):
                continue
            assert SOURCE.search(line), f"{file.name}: {line}"
