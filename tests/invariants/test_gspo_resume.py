"""A killed GSPO run ends in the weights of one that was left alone, bit for bit.

Rollouts, rewards, packed rows and updates are all made again from the last border of a batch.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.train import small_gspo

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


def final_tensors(out: Path) -> dict[str, torch.Tensor]:
    path = latest(out / "checkpoints")
    assert path is not None
    assert path.name == f"checkpoint-{NUM_STEPS:08d}"
    return {
        f"{name}:{key}": tensor
        for name in ("weights", "optimiser")
        for key, tensor in safetensors.torch.load_file(path / f"{name}.safetensors").items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_process_leaves_a_run_that_ends_the_same(tmp_path: Path, seed: int) -> None:
    start = small_gspo.write_start(tmp_path)
    run(tmp_path / "whole", start)
    out = tmp_path / "run"
    program = (
        "import sys; from pathlib import Path; from tests.invariants import test_gspo_resume as t; "
        "t.run(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", program, str(out), str(start)], cwd=root)
    deadline = time.monotonic() + 200
    while latest(out / "checkpoints") is None and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0.0, 1.0))
    process.kill()
    process.wait()
    path = latest(out / "checkpoints")
    assert path is not None
    assert int(path.name.partition("-")[2]) % 2 == 0  # the borders of batches alone
    run(out, start, run__resume=True)
    before, after = final_tensors(tmp_path / "whole"), final_tensors(out)
    assert before.keys() == after.keys()
    differing = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert differing == []
    whole, resumed = small_gspo.logged(tmp_path / "whole"), small_gspo.logged(out)
    assert [line["loss"] for line in whole] == [line["loss"] for line in resumed]
    assert [line.get("reward") for line in whole] == [line.get("reward") for line in resumed]
