"""A killed GSPO run ends in the weights of one that was left alone, bit for bit.

Rollouts, rewards, packed rows and updates are all made again from the last border of a batch.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tests.processes import killed_after_a_checkpoint
from tests.train import small_gspo
from tests.train.run_folders import differing, logged

from cascadevl.train.checkpoint import latest

NUM_STEPS = 12
SETTINGS: dict[str, Any] = {
    "model__precision": "bfloat16",
    "optim__name": "muon",
    "rollout__precision": "packed",
    "run__num_steps": NUM_STEPS,
    "run__checkpoint_interval": 1,
}


def run(out: Path, start: Path, **values: Any) -> None:
    small_gspo.run(out, start, **SETTINGS, **values)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_process_leaves_a_run_that_ends_the_same(tmp_path: Path, seed: int) -> None:
    start = small_gspo.write_start(tmp_path)
    run(tmp_path / "whole", start)
    out = tmp_path / "run"
    after_s = random.Random(seed).uniform(0.0, 1.0)
    killed_after_a_checkpoint(out, run, out, start, after_s=after_s)
    path = latest(out / "checkpoints")
    assert path is not None
    assert int(path.name.partition("-")[2]) % 2 == 0  # the borders of batches alone
    run(out, start, run__resume=True)
    assert differing(tmp_path / "whole", out, NUM_STEPS, ("weights", "optimiser")) == []
    whole, resumed = logged(tmp_path / "whole"), logged(out)
    assert [line["loss"] for line in whole] == [line["loss"] for line in resumed]
    assert [line.get("reward") for line in whole] == [line.get("reward") for line in resumed]
