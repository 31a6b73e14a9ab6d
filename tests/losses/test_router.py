"""Labels and loss of the router equal the loops; each line of them has a test that dies with it."""

from __future__ import annotations

import pytest
import torch
from tests.reference import router_labels_by_hand as by_hand
from torch import Tensor

from cascadevl.losses.router import (
    COMPRESS,
    KEEP,
    LabelForm,
    TileLabels,
    balanced_weights,
    router_loss,
    sliding_quantile,
    tile_labels,
    variance_between,
)

FORMS: tuple[LabelForm, ...] = ("ratio", "difference")


def drawn(num_samples: int = 40, seed: int = 3) -> list[tuple[float, list[float]]]:
    """Full losses over some orders of magnitude, and losses of one to five tiles a sample."""
    generator = torch.Generator().manual_seed(seed)
    full = (torch.randn(num_samples, generator=generator, dtype=torch.float64) * 2).exp()
    counts = torch.randint(1, 6, (num_samples,), generator=generator).tolist()
    tiles = [torch.rand(n, generator=generator, dtype=torch.float64) + 0.5 for n in counts]
    return [(float(loss), (loss * each).tolist()) for loss, each in zip(full, tiles, strict=True)]


def labelled(samples: list[tuple[float, list[float]]], **values: object) -> TileLabels:
    sample = torch.repeat_interleave(torch.tensor([len(tiles) for _, tiles in samples]))
    compressed = [tile for _, tiles in samples for tile in tiles]
    full = [loss for loss, _ in samples]
    more = {"form": "ratio", "percentile": 50.0, "window": 1024, "floor": 0.1} | values
    return tile_labels(
        torch.tensor(compressed, dtype=torch.float64),
        torch.tensor(full, dtype=torch.float64),
        sample,
        **more,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("percentile", [50.0, 20.0])
@pytest.mark.parametrize("window", [7, 1024])
def test_labels_equal_the_loops(form: LabelForm, percentile: float, window: int) -> None:
    samples = drawn()
    found = labelled(samples, form=form, percentile=percentile, window=window, floor=0.5)
    keep, measures, floored = by_hand.labels(
        samples, ratio=form == "ratio", percentile=percentile, window=window, floor=0.5
    )
    assert found.keep.tolist() == keep
    assert found.measure.tolist() == pytest.approx(measures, rel=1e-12)
    assert found.floored.tolist() == floored
    assert any(floored)
    assert not all(floored)
    assert {*keep} == {True, False}


def test_labels_on_paper() -> None:
    """Full losses 1, 4 and 0.1: the last is below its floor, half of the median of 1."""
    samples = [(1.0, [2.0, 1.0]), (4.0, [4.0, 12.0]), (0.1, [0.5, 0.2])]
    ratio = labelled(samples, floor=0.5)
    assert ratio.measure.tolist() == pytest.approx([2.0, 1.0, 1.0, 3.0, 1.0, 0.4])
    assert ratio.threshold.tolist() == pytest.approx([1.0] * 6)
    assert ratio.keep.tolist() == [True, True, True, True, True, False]
    assert ratio.floored.tolist() == [False, False, True]
    difference = labelled(samples, form="difference")
    assert difference.measure.tolist() == pytest.approx([1.0, 0.0, 0.0, 8.0, 0.4, 0.1])
    assert difference.threshold.tolist() == pytest.approx([0.25] * 6)
    assert difference.keep.tolist() == [True, False, False, True, True, False]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("percentile", [50.0, 25.0])
def test_so_large_a_part_is_compressed(form: LabelForm, percentile: float) -> None:
    found = labelled(drawn(400), form=form, percentile=percentile, window=128)
    assert (~found.keep).double().mean().item() == pytest.approx(percentile / 100, abs=0.04)


def test_a_window_follows_values_that_drift() -> None:
    values = torch.linspace(0, 1, 100, dtype=torch.float64)
    assert (values >= sliding_quantile(values, 0.5, 10))[10:].all()
    assert (values >= sliding_quantile(values, 0.5, 100)).sum() == 50


def test_windows_that_are_sorted_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(50, dtype=torch.float64)
    whole = sliding_quantile(values, 0.3, 8)
    monkeypatch.setattr("cascadevl.losses.router._CELLS", 24)
    assert torch.equal(sliding_quantile(values, 0.3, 8), whole)
    assert sliding_quantile(values[:0], 0.3, 8).shape == (0,)


def test_without_a_floor_a_tiny_denominator_labels_the_whole_sample() -> None:
    """Ten samples of two tiles, of which one matters; one sample has no loss to speak of."""
    samples = [(1.0, [1.0, 2.0]) for _ in range(9)] + [(1e-9, [1e-6, 1e-6])]
    assert labelled(samples, floor=0.0).keep[-2:].tolist() == [True, True]
    assert labelled(samples, floor=0.1).keep[-2:].tolist() == [False, False]


def test_variance_is_shared_out_as_in_the_loops() -> None:
    samples = drawn()
    found = labelled(samples)
    sample = torch.repeat_interleave(torch.tensor([len(tiles) for _, tiles in samples]))
    groups = [group.tolist() for group in found.measure.split([len(t) for _, t in samples])]
    wanted = by_hand.variance_between(groups)
    assert 0.05 < wanted < 0.95
    assert variance_between(found.measure, sample).item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("labels", "share"), [([0, 1, 0, 1], 0.0), ([0, 0, 1, 1], 1.0), ([1, 1, 1, 1], 0.0)]
)
def test_variance_of_labels_within_and_between_samples(labels: list[int], share: float) -> None:
    values = torch.tensor(labels, dtype=torch.float64)
    assert variance_between(values, torch.tensor([0, 0, 1, 1])).item() == share


def test_both_labels_weigh_alike() -> None:
    keep = torch.tensor([True, False, False, False])
    assert balanced_weights(keep).tolist() == pytest.approx([2.0, 2 / 3, 2 / 3, 2 / 3])
    for same in (torch.ones(3), torch.zeros(3)):
        assert balanced_weights(same.bool()).tolist() == [1.0] * 3


def some_tiles() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(9, 2, generator=generator, dtype=torch.float64).requires_grad_()
    keep = torch.rand(9, generator=generator) > 0.4
    weights = torch.rand(9, generator=generator, dtype=torch.float64) + 0.5
    return logits, keep, weights


def test_the_loss_equals_the_loops() -> None:
    logits, keep, weights = some_tiles()
    found = router_loss(logits, keep, weights, float(weights.sum()))
    tiles = [
        (*pair, label, weight)
        for pair, label, weight in zip(
            logits.tolist(), keep.tolist(), weights.tolist(), strict=True
        )
    ]
    entropy, accuracy, kept = by_hand.loss(tiles)
    assert found.loss.item() == pytest.approx(entropy, rel=1e-12)
    assert found.accuracy.item() == pytest.approx(accuracy, rel=1e-12)
    assert found.kept.item() == pytest.approx(kept, rel=1e-12)
    assert 0 < accuracy < 1
    assert kept != accuracy


def test_batches_of_a_step_add_up() -> None:
    logits, keep, weights = some_tiles()
    total = float(weights.sum())
    whole = router_loss(logits, keep, weights, total).loss
    parts = [
        router_loss(logits[part], keep[part], weights[part], total).loss
        for part in (slice(0, 4), slice(4, 9))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_the_gradient_pulls_each_tile_to_its_label() -> None:
    """Place 0 is to compress, as in released weights: label 1, keep, pulls at place 1."""
    logits, keep, weights = some_tiles()
    (gradient,) = torch.autograd.grad(router_loss(logits, keep, weights, 1.0).loss, logits)
    wanted = weights[:, None] * logits.detach().softmax(-1)
    wanted[keep, KEEP] -= weights[keep]
    wanted[~keep, COMPRESS] -= weights[~keep]
    torch.testing.assert_close(gradient, wanted)


def test_bfloat16_logits_are_widened() -> None:
    logits = torch.tensor([[8.0, 0.0]], dtype=torch.bfloat16)
    found = router_loss(logits, torch.tensor([False]), torch.ones(1), 1.0)
    assert found.loss.item() == pytest.approx(3.3540637e-4, rel=1e-4)
