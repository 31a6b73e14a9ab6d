"""What TRL's GRPOTrainer computes of given log-probabilities: rewrites gspo_trl.json.

Run it with the Python of an environment that has TRL: ``python tests/golden/make_gspo.py``. It
calls TRL's own `GRPOTrainer._compute_loss` on a stand-in for the trainer that gives it
log-probabilities, so model, sampling and padding play no part. Everything is float64.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from torch import Tensor
from trl import GRPOTrainer

PATH = Path(__file__).with_name("gspo_trl.json")
LENGTHS = (1, 5, 3, 2, 7, 4)
CLIPS = ((3e-4, 4e-4), (0.2, 0.2), (0.05, 0.3))
SPREADS = (1e-4, 0.2)


class Alone:
    """What TRL asks of accelerate, for one process."""

    def gather(self, value: Tensor) -> Tensor:
        """Nothing to gather."""
        return value

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        """Nothing to reduce."""
        del reduction
        return value


def compute(
    level: str, now: Tensor, old: Tensor, mask: Tensor, advantages: Tensor, clip: Any
) -> Any:
    """TRL's loss and the share it counts as clipped."""
    trainer = SimpleNamespace(
        importance_sampling_level=level,
        loss_type="grpo",
        epsilon_low=clip[0],
        epsilon_high=clip[1],
        beta=0.0,
        args=SimpleNamespace(delta=None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=Alone(),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (now, torch.zeros_like(now), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.int64),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    is_clipped = trainer._metrics["train"]["clip_ratio/region_mean"][0]
    return loss, is_clipped


def case(level: str, clip: tuple[float, float], spread: float) -> dict[str, Any]:
    """One set of answers of uneven lengths, padded as TRL pads them."""
    generator = torch.Generator().manual_seed(int(1e4 * (clip[0] + clip[1] + spread)))
    width = max(LENGTHS)
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    old = -torch.rand(mask.shape, generator=generator, dtype=torch.float64) * 3
    now = old + spread * torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    now.requires_grad_()
    advantages = torch.randn(len(mask), generator=generator, dtype=torch.float64)
    loss, is_clipped = compute(level, now, old, mask, advantages, clip)
    (gradient,) = torch.autograd.grad(loss, now)

    def rows(values: Tensor) -> list[list[float]]:
        return [row[:length] for row, length in zip(values.tolist(), LENGTHS, strict=True)]

    if level == "token":  # TRL counts tokens over all answers; we count them within each
        ratios = (now - old).exp().detach()
        low = (ratios < 1 - clip[0]) & (advantages[:, None] < 0)
        high = (ratios > 1 + clip[1]) & (advantages[:, None] > 0)
        is_clipped = (((low | high) * mask).sum(-1) / mask.sum(-1)).mean().item()
    return {
        "level": level,
        "clip_low": clip[0],
        "clip_high": clip[1],
        "logprobs": rows(now.detach()),
        "old_logprobs": rows(old),
        "advantages": advantages.tolist(),
        "loss": loss.item(),
        "gradient": rows(gradient),
        "clipped": float(is_clipped),
    }


def main() -> None:
    """Write the file."""
    cases = [
        case(level, clip, spread)
        for level in ("sequence", "token")
        for clip in CLIPS
        for spread in SPREADS
    ]
    document = {"trl": trl.__version__, "torch": torch.__version__, "cases": cases}
    PATH.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
