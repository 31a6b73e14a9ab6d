"""The second half of `make demo`: what micro learned of boxes is reinforced, offline and online.

A box is right if it overlaps with the true one by half (IoU), which is all the reward there is.
What the fine-tuned model answers to new pictures makes pairs for MPO and chooses the questions of
GSPO, as in the report's cascade.
"""

from __future__ import annotations

from pathlib import Path

from cascadevl.engine.packed_weights import Precision
from cascadevl.losses.mpo import MPOSettings
from cascadevl.scoring.rewards import RewardConfig
from cascadevl.train.config import BatchConfig, DataConfig
from cascadevl.train.gspo_config import GSPOConfig, PolicyConfig, ProblemsConfig, RolloutConfig
from cascadevl.train.loop import RunConfig
from cascadevl.train.mpo import MPOConfig, MPOSection
from cascadevl.train.optim import OptimConfig
from cascadevl.workflows import micro
from cascadevl.workflows.boxes import SEED
from cascadevl.workflows.cascade_config import CascadeConfig, SamplingSection

TASK = "grounding"
SCENES = 600
ANSWER_TOKENS = 128
MPO_STEPS, GSPO_STEPS = 60, 96

UPDATES = 4
"""Of a rollout batch (GSPO paper)."""


def cascade_config(
    out: Path, *, model: str, steps_scale: float, precision: Precision | None
) -> CascadeConfig:
    """MPO, then GSPO, on boxes.

    Args:
        out: Folder of both.
        model: The fine-tuned model.
        steps_scale: Factor on the number of steps and of pictures.
        precision: How the engine's linear layers are packed, where this machine can.
    """
    return CascadeConfig(
        model=model,
        stages=("rollouts", "pairs", "mpo", "filter", "gspo"),
        problems=ProblemsConfig(
            tasks=(TASK,), px=micro.TILE_PX, scenes=max(8, round(SCENES * steps_scale))
        ),
        rollouts=SamplingSection(
            num_samples=8, max_tokens=ANSWER_TOKENS, precision=precision, seed=SEED
        ),
        mpo=_mpo(max(2, round(MPO_STEPS * steps_scale))),
        gspo=_gspo(UPDATES * max(1, round(GSPO_STEPS * steps_scale / UPDATES)), precision),
        out=out,
    )


def _mpo(num_steps: int) -> MPOConfig:
    released = MPOSettings()
    return MPOConfig(
        data=DataConfig(max_tokens=2048, jpeg=False, prefetch=0),
        batch=BatchConfig(packing="count", row_samples=16),
        optim=OptimConfig(
            name="adamw", lr=2e-5, betas=(0.9, 0.95), warmup_ratio=0.03, schedule="cosine"
        ),
        mpo=MPOSection(
            preference_weight=released.preference_weight,
            quality_weight=released.quality_weight,
            generation_weight=released.generation_weight,
        ),
        run=_run(num_steps, checkpoint_interval=20),
    )


def _gspo(num_steps: int, precision: Precision | None) -> GSPOConfig:
    return GSPOConfig(
        data=DataConfig(max_tokens=512, jpeg=False),
        batch=BatchConfig(row_tokens=4096, row_tiles=256),
        optim=OptimConfig(
            name="adamw",
            lr=3e-5,  # at 1e-4 it learned its own questions and forgot others (docs/experiments.md)
            betas=(0.9, 0.95),
            warmup_ratio=0.0,
            schedule="constant",
            weight_decay=0.01,
        ),
        rollout=RolloutConfig(
            prompts=32,
            group=16,
            max_prompt_tokens=256,
            max_answer_tokens=ANSWER_TOKENS,
            precision=precision or "model",
        ),
        rewards=RewardConfig(weights={"accuracy": 1.0}),
        policy=PolicyConfig(updates=UPDATES, clip_low=0.02, clip_high=0.03),
        run=_run(num_steps, checkpoint_interval=UPDATES),
    )


def _run(num_steps: int, *, checkpoint_interval: int) -> RunConfig:
    return RunConfig(
        num_steps=num_steps,
        seed=SEED,
        log_interval=4,
        eval_interval=max(1, num_steps // 4),
        checkpoint_interval=checkpoint_interval,
        keep_last=1,
    )
