"""Writes mpo.json, what TRL's DPO trainer makes of given log-probabilities, in float64.

TRL is no dependency of this project. Run this with the Python of an environment that has it:
``python tests/golden/make_mpo.py``. The trainer's own ``_compute_loss`` is called; a stand-in for
the model hands it the log-probabilities of tokens, and the reference's are given as precomputed.
TRL's ``bco_pair`` has no reward shift, so it is compared where ours is 0. Its ``sft`` is a mean
over the tokens of all chosen answers, so cases that use it have one pair, or chosen answers of one
length.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from trl import DPOTrainer

PATH = Path(__file__).with_name("mpo.json")
PROMPT_TOKENS = 2
LOSS_TYPES = ("sigmoid", "bco_pair", "sft")
SMOOTHING = {"robust": 0.2, "exo_pair": 0.01}
FORMS = (
    "sigmoid",
    "sigmoid_norm",
    "robust",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
)


class StandIn(torch.nn.Module):
    """A model whose answers are known: the log-probabilities of all tokens."""

    def __init__(self, logprobs: torch.Tensor) -> None:
        super().__init__()
        self.logprobs = logprobs

    def forward(self, **_: Any) -> SimpleNamespace:
        """What TRL's fused head returns, with nothing in what is only recorded."""
        nothing = torch.zeros_like(self.logprobs).detach()
        return SimpleNamespace(
            log_probs=self.logprobs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )


class Alone:
    """An accelerator of one process."""

    device = torch.device("cpu")

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values

    gather_for_metrics = gather


def draw(lengths: list[int], seed: int) -> tuple[list[list[float]], list[float]]:
    """Tokens' log-probabilities of answers, chosen ones first, and the reference's sums."""
    generator = torch.Generator().manual_seed(seed)
    answers, sums = [], []
    for length in lengths:
        reference = -torch.rand(length, generator=generator, dtype=torch.float64) * 4
        moved = reference + torch.randn(length, generator=generator, dtype=torch.float64)
        answers.append(moved.tolist())
        sums.append(float(reference.sum()))
    return answers, sums


def ask_trl(
    answers: list[list[float]],
    reference: list[float],
    *,
    loss_types: tuple[str, ...],
    weights: tuple[float, ...],
    beta: float,
    label_smoothing: float = 0.0,
) -> dict[str, Any]:
    """Loss, gradient of every token's log-probability, and TRL's own metrics."""
    longest = max(map(len, answers))
    tokens = [torch.tensor(answer, dtype=torch.float64).requires_grad_() for answer in answers]
    rows = []
    mask = torch.zeros(len(answers), PROMPT_TOKENS + longest, dtype=torch.int64)
    for number, row in enumerate(tokens):
        mask[number, PROMPT_TOKENS : PROMPT_TOKENS + len(row)] = 1
        # One place less than tokens: the first token of a row is never predicted.
        rows.append(
            torch.cat([row.new_zeros(PROMPT_TOKENS - 1), row, row.new_zeros(longest - len(row))])
        )
    half = len(answers) // 2
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Alone(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=list(loss_types),
        loss_weights=list(weights),
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": torch.tensor(reference[:half], dtype=torch.float64),
        "ref_rejected_logps": torch.tensor(reference[half:], dtype=torch.float64),
    }
    loss = DPOTrainer._compute_loss(trainer, StandIn(torch.stack(rows)), inputs, False)
    loss.backward()
    return {
        "loss": loss.item(),
        "gradients": [token.grad.tolist() for token in tokens],
        "metrics": {
            name: values[-1]
            for name, values in trainer._metrics["train"].items()
            if name in ("rewards/margins", "rewards/accuracies")
        },
    }


def mpo_cases() -> list[dict[str, Any]]:
    """The three terms together and one by one."""
    cases = []
    for name, lengths, weights in (
        ("one pair", [6, 3], (0.8, 0.2, 1.0)),
        ("chosen answers of one length", [4, 4, 4, 2, 7, 3], (0.8, 0.2, 1.0)),
        ("preference alone", [3, 1, 7, 5, 2, 4], (1.0, 0.0, 0.0)),
        ("quality alone", [3, 1, 7, 5, 2, 4], (0.0, 1.0, 0.0)),
    ):
        for beta in (0.1, 0.5):
            answers, reference = draw(lengths, seed=len(cases))
            found = ask_trl(answers, reference, loss_types=LOSS_TYPES, weights=weights, beta=beta)
            given = {"answers": answers, "reference": reference, "weights": weights, "beta": beta}
            cases.append({"name": f"{name}, beta {beta}", **given, **found})
    return cases


def preference_cases() -> list[dict[str, Any]]:
    """The forms of the preference term that TRL has, too."""
    cases = []
    for number, form in enumerate(FORMS):
        answers, reference = draw([3, 1, 7, 5, 2, 4], seed=100 + number)
        smoothing = SMOOTHING.get(form, 0.0)
        found = ask_trl(
            answers,
            reference,
            loss_types=(form,),
            weights=(1.0,),
            beta=0.2,
            label_smoothing=smoothing,
        )
        given = {"answers": answers, "reference": reference, "beta": 0.2}
        cases.append(
            {"name": form, "preference": form, "label_smoothing": smoothing, **given, **found}
        )
    return cases


def main() -> None:
    """Write the file."""
    document = {
        "versions": {"trl": trl.__version__, "torch": torch.__version__},
        "mpo": mpo_cases(),
        "preference": preference_cases(),
    }
    PATH.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
