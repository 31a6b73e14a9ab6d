"""The configurations of the router say what the InternVL3.5 report says of ViCO's second stage.

The tables here were typed from the report, not copied from the files under test.
"""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import pytest
from tests.test_released_configs import SOURCE, TRIALS

from cascadevl.cli.main import make_parser
from cascadevl.cli.train import read_config
from cascadevl.train.router_config import RouterConfig

CONFIGS = Path(__file__).parents[1] / "configs"

REPORT = {
    "router.label": "ratio",
    "router.percentile": 50.0,
    "router.balanced": True,
    "data.increment": 1.0,
}
DECIDED = {"router.window": 1024, "router.floor": 0.1}  # docs/decisions/0030

SIZES = {
    "1b": "OpenGVLab/InternVL3_5-1B",
    "2b": "OpenGVLab/InternVL3_5-2B",
    "4b": "OpenGVLab/InternVL3_5-4B",
    "8b": "OpenGVLab/InternVL3_5-8B",
    "14b": "OpenGVLab/InternVL3_5-14B",
    "38b": "OpenGVLab/InternVL3_5-38B",
    "30b-a3b": "OpenGVLab/InternVL3_5-30B-A3B",
    "241b-a28b": "OpenGVLab/InternVL3_5-241B-A28B",
    "nano": "runs/sft_nano/model",
    "micro": "micro",
}


def files() -> list[Path]:
    return sorted(CONFIGS.glob("router_*.yaml"))


@pytest.mark.parametrize("size", SIZES)
def test_router_of_a_size(size: str) -> None:
    words = ["train", "router", str(CONFIGS / f"router_{size}.yaml")]
    config = read_config(make_parser().parse_args(words))
    assert isinstance(config, RouterConfig)
    own = {
        "model.path": f"runs/vico_{size}/model",
        "router.reference": SIZES[size],
        "run.out": Path(f"runs/router_{size}"),
    }
    expected = REPORT | DECIDED | own
    assert {key: attrgetter(key)(config) for key in expected} == expected
    # A third of the tiles at 256 tokens and the rest at 64 are half of the tokens.
    share = config.router.keep_share
    assert share + (1 - share) / 4 == pytest.approx(0.5, abs=1e-3)


def test_every_flash_model_of_the_report_has_its_file() -> None:
    assert {file.stem.removeprefix("router_") for file in files()} == set(SIZES)


def test_every_value_has_its_source_beside_it() -> None:
    for file in [*files(), CONFIGS / "bases/router_internvl3_5.yaml"]:
        if file.stem.removeprefix("router_") in TRIALS:
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition("#")[0].partition(":")
            if value.strip() and key.strip() not in ("base", "out"):
                assert SOURCE.search(line), f"{file.name}: {line}"
