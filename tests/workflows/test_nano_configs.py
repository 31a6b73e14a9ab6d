"""The published nano configurations are what `make nano` trains with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cascadevl.config import load_config
from cascadevl.train.config import TrainConfig
from cascadevl.workflows import nano

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_published_configuration_is_the_demos(stage: str) -> None:
    published = load_config(TrainConfig, files=[CONFIGS / f"{stage}_nano.yaml"])
    steps = {"pretrain": nano.PRETRAIN_STEPS, "sft": nano.SFT_STEPS}[stage]
    model = None if stage == "pretrain" else Path(str(published.model.path))
    used = nano.stage_config(stage, published.run.out, num_steps=steps, model=model)
    # How often it looks at its model, and that it resumes, is its own affair.
    run = replace(used.run, resume=published.run.resume, eval_interval=published.run.eval_interval)
    assert replace(used, run=run) == published
