"""A packed pair = its two conversations alone: log-probabilities, loss and gradients.

Chosen and rejected answer share prompt and picture in a row; the picture is encoded once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tests.train.small_pairs import Pairs, mpo_config
from torch import Tensor

from cascadevl.data.pairs import PairBatch, PairBuilder, PairCollate
from cascadevl.losses.mpo import MPOSettings, PairLogprobs, mpo_loss
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.train.logprobs import answer_lengths, answer_logprobs
from cascadevl.train.mpo_objective import ShiftMemory, mpo_objective, pair_logprobs
from cascadevl.train.sources import collate_config, example_builder
from cascadevl.train.start import make_trainable, start_from
from cascadevl.types import Batch, Example, Record

SHIFT = 0.25


class Setting:
    """Nano with random weights, and five pairs of which one has no picture."""

    def __init__(self, folder: Path) -> None:
        config = mpo_config(folder / "run", folder / "start", data__increment=0.25)
        self.config = config
        self.model, processor = start_from(config.model)
        self.builder = example_builder(config.data, processor, 0)
        self.packed = collate_config(config.batch, processor, self.model.config)
        self.records = [Pairs()[index] for index in range(1, 6)]
        self.examples = [PairBuilder(self.builder)(record) for record in self.records]
        generator = torch.Generator().manual_seed(1)
        self.reference = -40 + 3 * torch.randn(2, len(self.records), generator=generator)

    def batch(self, rows: list[list[int]]) -> PairBatch:
        """Some of the pairs, with made-up values of a reference."""
        batch = PairCollate(packed=self.packed)([[self.examples[n] for n in row] for row in rows])
        order = [n for row in rows for n in row]
        return PairBatch(
            packed=batch.packed,
            chosen=batch.chosen,
            rejected=batch.rejected,
            reference=self.reference[:, order],
            sources=batch.sources,
        )

    def alone(self, record: Record, branch: int) -> Batch:
        """One answer's conversation by itself, as other stages see it."""
        turns = (*record.messages, *record.branches[branch])
        whole = Record(
            source=record.source,
            record_id=record.record_id,
            messages=turns,
            dataset=record.dataset,
        )
        example: Example = self.builder(whole)
        return self.packed([[example]])


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("pairs"))


def gradients(model: CascadeVLForConditionalGeneration, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def packed_loss(model: CascadeVLForConditionalGeneration, batches: list[PairBatch]) -> Tensor:
    memory = ShiftMemory()
    memory.shift = memory.shift.after(SHIFT * 10, 10.0)
    objective = mpo_objective(MPOSettings(), memory, Accelerator(cpu=True))
    pairs = sum(objective.weigh(batch) for batch in batches)
    return torch.stack([objective.loss(model, batch, pairs).loss for batch in batches]).sum()


def test_a_packed_row_equals_its_answers_alone(setting: Setting) -> None:
    model = setting.model
    batches = [[setting.alone(r, branch) for r in setting.records] for branch in (0, 1)]
    sums = [torch.cat([answer_logprobs(model, b) for b in side]) for side in batches]
    lengths = [torch.cat([answer_lengths(b) for b in side]) for side in batches]
    by_itself = PairLogprobs(
        chosen=sums[0],
        rejected=sums[1],
        reference_chosen=setting.reference[0],
        reference_rejected=setting.reference[1],
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
    )
    whole = setting.batch([[0, 1, 2], [3, 4]])
    together = pair_logprobs(model, whole)
    for name in ("chosen", "rejected", "chosen_lengths", "rejected_lengths"):
        torch.testing.assert_close(
            getattr(together, name), getattr(by_itself, name), rtol=1e-5, atol=1e-4
        )
    pairs = float(len(setting.records))
    wanted = mpo_loss(by_itself, pairs, reward_shift=SHIFT, settings=MPOSettings()).loss
    found = packed_loss(model, [whole])
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    first, second = gradients(model, found), gradients(model, wanted)
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, second[name], rtol=1e-3, atol=1e-5)


def test_however_the_pairs_of_a_step_are_divided_its_gradient_is_the_same(
    setting: Setting,
) -> None:
    whole = gradients(setting.model, packed_loss(setting.model, [setting.batch([[0, 1, 2, 3, 4]])]))
    parts = [setting.batch([[3]]), setting.batch([[0, 4], [1]]), setting.batch([[2]])]
    divided = gradients(setting.model, packed_loss(setting.model, parts))
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, divided[name], rtol=1e-3, atol=1e-5)


def test_each_picture_is_encoded_once_a_pair(setting: Setting) -> None:
    tiles: list[int] = []
    tower = setting.model.model.vision_tower
    handle = tower.register_forward_hook(
        lambda module, args, kwargs, out: tiles.append(len(kwargs["pixel_values"])),
        with_kwargs=True,
    )
    pair_logprobs(setting.model, setting.batch([[0, 1, 2], [3, 4]]))
    handle.remove()
    assert tiles == [sum(example.num_tiles for example in setting.examples)]
    assert sum(example.num_tiles > 0 for example in setting.examples) == 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_dropped_whatever_the_model_and_the_mode(
    setting: Setting, checkpointing: bool
) -> None:
    expected = gradients(
        setting.model, packed_loss(setting.model, [setting.batch([[0, 1, 2, 3, 4]])])
    )
    model, _ = start_from(setting.config.model)
    config = replace(setting.config.model, drop_path=0.9, gradient_checkpointing=checkpointing)
    make_trainable(model, config, Accelerator(cpu=True))
    with model.no_drop_path():
        model.train()  # as the loop does at every step
        found = gradients(model, packed_loss(model, [setting.batch([[0, 1, 2, 3, 4]])]))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)
