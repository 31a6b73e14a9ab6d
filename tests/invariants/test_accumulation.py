"""Accumulated = one batch = several processes: one normaliser for the whole step.

Square averaging is wrong under any mean of means: the micro-batches here weigh differently, and
one of them has no picture at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from tests.processes import shared_by
from tests.train.small_run import Given, small_config, sources, tokenizer
from torch import Tensor

from cascadevl.data.collate import collate
from cascadevl.data.example import ExampleBuilder
from cascadevl.losses.next_token import Averaging
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.train.loop import TrainState, update
from cascadevl.train.objective import NEXT_TOKEN
from cascadevl.train.optim import OptimConfig, Optimiser
from cascadevl.train.sources import example_config
from cascadevl.train.start import from_scratch, make_trainable
from cascadevl.types import Batch, Example, Message, Record

TEXTS = (
    ("How many shapes are there?", "2"),
    ("Describe it.", "a red circle left, a blue square right, a green triangle at the top"),
)


class Setting:
    """Nano, three pictures with many answers each, and two texts."""

    def __init__(self) -> None:
        config = small_config(Path("unused"))
        self.model, processor = from_scratch(config.model, tokenizer(), seed=0)
        self.model_config, self.processor = config.model, processor
        builder = ExampleBuilder(processor.tokenizer, example_config(config.data, processor, 0), 16)
        texts = [
            Record(
                source=f"text:{number}",
                record_id=str(number),
                messages=(Message.of("user", question), Message.of("assistant", answer)),
            )
            for number, (question, answer) in enumerate(TEXTS)
        ]
        self.examples = [builder(r) for r in [*texts, *(sources()[0].source[n] for n in range(3))]]

    def batch(self, rows: Sequence[Sequence[Example]], averaging: Averaging = "square") -> Batch:
        return collate(
            rows,
            image_token_id=self.processor.image_token_id,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            tokens_per_tile=16,
            averaging=averaging,
        )

    def state(self) -> TrainState[Batch]:
        model = CascadeVLForConditionalGeneration(self.model.config)
        model.load_state_dict(self.model.state_dict())
        accelerator = Accelerator(cpu=True)
        make_trainable(model, self.model_config, accelerator)
        optimiser = Optimiser(model.named_parameters(), OptimConfig(max_grad_norm=0.0))
        return TrainState(
            model=model, optimiser=optimiser, stream=Given([]), accelerator=accelerator
        )

    def gradients(self, micro_batches: Sequence[Batch]) -> tuple[list[Tensor], float]:
        state = self.state()
        update(state, micro_batches, NEXT_TOKEN)
        return state.optimiser.gradients(), state.metrics["loss"]


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


def distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest gradient of the same parameter."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-3))
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("averaging", ["token", "square", "sample"])
def test_however_a_step_is_divided_its_gradient_is_the_same(
    setting: Setting, averaging: Averaging
) -> None:
    e = setting.examples
    whole, loss = setting.gradients([setting.batch([e], averaging)])
    for parts in ([e[:2], e[2:]], [[e[4]], [e[0], e[3]], [e[1], e[2]]]):
        gradients, same_loss = setting.gradients(
            [setting.batch([part], averaging) for part in parts]
        )
        assert same_loss == pytest.approx(loss, rel=1e-5)
        assert distance(gradients, whole) < 1e-4


def test_a_mean_of_means_would_be_another_gradient(setting: Setting) -> None:
    """What the invariance above protects from is visible in this very setting."""
    e = setting.examples
    whole, _ = setting.gradients([setting.batch([e])])
    halves = [setting.gradients([setting.batch([part])])[0] for part in (e[:2], e[2:])]
    mean_of_means = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
    assert distance(mean_of_means, whole) > 0.1


def test_padding_and_rows_do_not_change_the_gradient(setting: Setting) -> None:
    e = setting.examples
    packed, loss = setting.gradients([setting.batch([e])])
    padded, same_loss = setting.gradients([setting.batch([[one] for one in e])])
    assert same_loss == pytest.approx(loss, rel=1e-5)
    assert distance(padded, packed) < 1e-4


def step_of_rank(out: Path) -> None:
    """Two optimiser steps; each process of a run takes its part, a lone one both."""
    setting = Setting()
    state = setting.state()
    parts = [setting.batch([setting.examples[:2]]), setting.batch([setting.examples[2:]])]
    accelerator = state.accelerator
    mine = parts if accelerator.num_processes == 1 else [parts[accelerator.process_index]]
    tensors = {}
    for step in range(2):
        update(state, mine, NEXT_TOKEN)
        names = [f"step {step}, gradient of {name}" for name in state.optimiser.masters]
        gradients = [gradient.clone() for gradient in state.optimiser.gradients()]
        tensors |= dict(zip(names, gradients, strict=True))
        state.optimiser.step(1.0)
        state.optimiser.zero_grad()
    tensors |= {name: master.detach() for name, master in state.optimiser.masters.items()}
    counts = torch.tensor([state.metrics["loss"], state.counters["tokens"]])
    file = out / f"{accelerator.num_processes}-{accelerator.process_index}.safetensors"
    safetensors.torch.save_file({**tensors, "counts": counts}, file)
    if accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    shared_by(2, step_of_rank, tmp_path)
    step_of_rank(tmp_path)
    alone = safetensors.torch.load_file(tmp_path / "1-0.safetensors")
    ranks = [safetensors.torch.load_file(tmp_path / f"2-{rank}.safetensors") for rank in range(2)]
    for name, tensor in ranks[0].items():
        assert torch.equal(tensor, ranks[1][name]), name
        # AdamW hides a factor on all gradients: so the gradients themselves are compared too
        scale = max(1e-3, float(alone[name].abs().max())) if "gradient" in name else 1.0
        torch.testing.assert_close(tensor / scale, alone[name] / scale, rtol=1e-5, atol=1e-5)
