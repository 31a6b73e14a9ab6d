"""The comparison of the cascade with its stages: what an arm goes through, and what counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cascadevl.config import load_config
from cascadevl.workflows.cascade_config import CascadeConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def arms() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import cascade_arms

        yield cascade_arms


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> CascadeConfig:
    monkeypatch.chdir(ROOT)
    return load_config(CascadeConfig, files=[ROOT / "configs" / "cascade_chains.yaml"])


def test_arms_share_what_stands_before_them(arms: ModuleType, chains: CascadeConfig) -> None:
    configs = {arm: arms.arm_config(chains, arm, 2, Path("out")) for arm in arms.ARMS}
    assert {config.ordered[:2] for config in configs.values()} == {("sft", "rollouts")}
    assert configs["cascade"].ordered == ("sft", "rollouts", "pairs", "mpo", "filter", "gspo")
    assert configs["MPO"].ordered[2:] == ("pairs", "mpo")
    assert configs["GSPO"].ordered == configs[arms.TWICE].ordered
    assert configs[arms.TWICE].gspo.run.num_steps == 2 * chains.gspo.run.num_steps
    assert {config.sft.run.seed for config in configs.values()} == {2}


def test_a_cascade_without_fine_tuning_begins_with_its_model(
    arms: ModuleType, chains: CascadeConfig
) -> None:
    plain = replace(chains, stages=("rollouts", "pairs", "mpo", "filter", "gspo"))
    assert arms.arm_config(plain, "GSPO", 0, Path("out")).ordered == ("rollouts", "filter", "gspo")


def line(stage: str, right: int, flops: float) -> dict[str, Any]:
    row = {"name": "chains", "share": right / 10, "num": 10, "constant": 0.1}
    exam = [] if stage == "rollouts" else [row]
    return {"stage": stage, "exam": exam, "seconds": 60.0, "flops": flops}


def answered(right: int) -> dict[str, list[bool]]:
    return {"chains": [number < right for number in range(10)]}


def test_fine_tuning_is_the_start_and_costs_no_arm_anything(arms: ModuleType) -> None:
    lines = [line("start", 0, 0), line("sft", 4, 9e12), line("rollouts", 0, 1e12)]
    results = [{"arm": "start", "seed": 0, "lines": lines[:2], "right": answered(4)}]
    for arm, right in (("MPO", 5), ("cascade", 7)):
        trained = [*lines, line("mpo", right, 2e12)]
        results.append({"arm": arm, "seed": 0, "lines": trained, "right": answered(right)})
    summary = arms.summarise(results)
    percents = {arm: found["greedy"]["percent"] for arm, found in summary.items()}
    assert percents == {"start": 40.0, "MPO": 50.0, "cascade": 70.0}
    assert summary["start"]["flops"] == [0.0]
    assert summary["MPO"]["flops"] == summary["cascade"]["flops"] == [3e12]
    assert summary["MPO"]["seconds"] == [120.0]
    assert summary["MPO"]["constant"] == {"chains": 10.0}


def test_the_lead_is_that_on_the_same_questions(arms: ModuleType) -> None:
    right = [True] * 5 + [False] * 45
    one = [{"right": {"chains": [not value for value in right]}}]
    other = [{"right": {"chains": right}}]
    found = arms.lead(one, other, "chains")
    assert found["percent"] == pytest.approx(80.0)
    assert found["low"] < 80.0 < found["high"] <= 100.0
    assert set(arms.lead(one, one, "chains").values()) == {0.0}
