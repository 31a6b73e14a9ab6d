"""Drop path: its rates, its mean, and when it is off."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.model.small import small_config, small_model

from cascadevl.errors import ConfigError
from cascadevl.model.drop_path import drop_branch


def test_a_branch_is_dropped_as_a_whole_and_keeps_its_mean() -> None:
    torch.manual_seed(0)
    branch = torch.ones(4000, 2, 3)
    dropped = drop_branch(branch, 0.25)
    per_tile = dropped.flatten(1)
    assert torch.equal(per_tile.amin(1), per_tile.amax(1))
    assert set(per_tile[:, 0].tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(float(dropped.mean()) - 1) < 0.03  # 3.3 standard deviations of the mean


def test_rates_rise_linearly_from_zero() -> None:
    assert small_model(drop_path_rate=0.4).model.drop_path.rates == [0.0, 0.2, 0.4]


def outputs(model, pixels: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return model.encode_images(pixels).projected


def test_it_works_in_training_only_and_not_while_paused() -> None:
    model = small_model(drop_path_rate=0.9)
    plain = small_model()  # the same weights
    pixels = torch.randn(8, 3, 28, 28)
    expected = outputs(plain, pixels)
    assert torch.equal(outputs(model, pixels), expected)
    model.train()
    plain.train()
    assert not torch.equal(outputs(model, pixels), expected)
    with model.no_drop_path():
        with model.no_drop_path():
            assert torch.equal(outputs(model, pixels), expected)
        assert torch.equal(outputs(model, pixels), expected)
    assert not torch.equal(outputs(model, pixels), expected)
    assert torch.equal(outputs(plain, pixels), expected)


def test_a_dropped_layer_passes_the_tile_through() -> None:
    """At a rate near 1 both branches of the last layer are gone."""
    model = small_model(drop_path_rate=0.999999).train()
    tower = model.model.vision_tower
    pixels = torch.randn(2, 3, 28, 28)
    torch.manual_seed(3)
    hidden = tower.encoder.layer[2](tower.embeddings(pixels))
    assert torch.equal(hidden, tower.embeddings(pixels))


def test_checkpointed_layers_drop_the_same_branches_again() -> None:
    model = small_model(drop_path_rate=0.5).train()
    pixels = torch.randn(4, 3, 28, 28)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        outputs(model, pixels).square().sum().backward()
        grads.append(model.model.vision_tower.embeddings.patch_embeddings.projection.weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-6)


def test_layers_computed_again_drop_nothing_either_while_it_is_off() -> None:
    pixels = torch.randn(4, 3, 28, 28)
    grads = []
    for rate in (0.0, 0.9):
        model = small_model(drop_path_rate=rate)
        model.activation_checkpointing_enable()
        with model.no_drop_path():
            model.train()  # as a training loop does, long after it was switched off
            outputs(model, pixels).square().sum().backward()
        grads.append(model.model.vision_tower.embeddings.patch_embeddings.projection.weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_a_copy_of_a_model_pauses_on_its_own() -> None:
    model = small_model(drop_path_rate=0.9).train()
    other = copy.deepcopy(model)
    pixels = torch.randn(8, 3, 28, 28)
    with model.no_drop_path():
        assert not torch.equal(outputs(model, pixels), outputs(other, pixels))


def test_a_rate_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[0, 1\)"):
        small_config(drop_path_rate=1.0)
