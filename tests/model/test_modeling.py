"""The composite model: its training call, projector, errors, precision and first weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.model.packed import head, pack, packed_batch, sample
from tests.model.small import IMAGE, small_config, small_model
from tests.reference import pixel_shuffle_by_hand

from cascadevl.errors import ConfigError, RequestError
from cascadevl.model.head import score_targets
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.presets import initialise, micro_config, nano_config, sincos_positions
from cascadevl.model.projector import pixel_shuffle


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("factor", [2, 4])
def test_pixel_shuffle_equals_the_loops(version: str, factor: int) -> None:
    grid = torch.randn(3, 4, 8, 5, generator=torch.Generator().manual_seed(0))
    got = pixel_shuffle(grid, 1 / factor, version)
    expected = [pixel_shuffle_by_hand.shuffle(tile.tolist(), factor, version) for tile in grid]
    assert torch.equal(got, torch.tensor(expected))


def test_a_side_that_cannot_be_joined_is_refused() -> None:
    with pytest.raises(ValueError, match="5 x 4 patches cannot be joined 2 x 2"):
        pixel_shuffle(torch.zeros(1, 5, 4, 3), 0.5)


def test_the_version_of_pixel_shuffle_comes_from_the_configuration() -> None:
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    first, second = (
        small_model(ps_version=version).encode_images(pixels).projected for version in ("v1", "v2")
    )
    swapped = second.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(first, swapped)
    assert not torch.allclose(first, second)


def test_logits_are_computed_where_targets_are_and_nowhere_else() -> None:
    model = small_model()
    batch = packed_batch([[1], [2]])
    few = torch.tensor([3, 11, 20])
    names = ("target_index", "target_ids", "target_weights", "target_samples")
    picked = replace(batch, **{name: getattr(batch, name)[few] for name in names})
    seen = []

    def head_fn(logits: torch.Tensor, place: slice) -> torch.Tensor:
        seen.append((tuple(logits.shape), place))
        return head(picked)(logits, place)

    got = model(batch=picked, head_fn=head_fn)
    assert seen == [((3, 97), slice(0, 3))]
    torch.testing.assert_close(got, model(batch=batch, head_fn=head(batch))[few])


def test_chunks_give_the_same_numbers_and_gradients_as_one_piece() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 8, generator=generator)
    weight = torch.randn(11, 8, generator=generator)
    index = torch.randint(0, 14, (10,), generator=generator)
    sizes, results = [], []
    for chunk_bytes in (4 * 11 * 3, 4 * 11 * 100):  # three targets at once, or all
        states, head_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        places = []

        def head_fn(logits: torch.Tensor, place: slice, places=places) -> torch.Tensor:
            places.append(place)
            return logits.log_softmax(-1)[:, 0] * torch.arange(place.start, place.stop)

        values = score_targets(
            states, index, lambda h, w=head_weight: h @ w.T, head_fn, 11, chunk_bytes=chunk_bytes
        )
        values.sum().backward()
        sizes.append([place.stop - place.start for place in places])
        results.append((values, states.grad, head_weight.grad))
    assert sizes[0][:4] == [3, 3, 3, 1]
    assert len(sizes[0]) == 8  # each chunk is computed again in the backward pass
    assert sizes[1] == [10]
    for chunked, whole in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole)


def test_text_alone_costs_no_vision_call() -> None:
    model = small_model()
    model.model.vision_tower.register_forward_hook(lambda *_: pytest.fail("the tower was called"))
    batch = packed_batch([[], []])
    assert torch.isfinite(model(batch=batch, head_fn=head(batch))).all()


def test_all_tiles_are_encoded_in_one_call() -> None:
    model = small_model()
    calls = []
    model.model.vision_tower.register_forward_hook(
        lambda _, __, output: calls.append(len(output.last_hidden_state))
    )
    batch = packed_batch([[1, 2], [3]])
    model(batch=batch, head_fn=head(batch))
    assert calls == [6]


def test_a_count_that_differs_names_both_numbers() -> None:
    model = small_model()
    each = sample([1])
    with pytest.raises(ValueError, match=r"4 image-context tokens.*8 visual tokens are given"):
        model(input_ids=each.input_ids[None], pixel_values=torch.zeros(2, 3, 28, 28))
    with pytest.raises(ValueError, match=r"4 image-context tokens.*0 visual tokens are given"):
        model(input_ids=each.input_ids[None])
    batch = packed_batch([[1]])
    short = replace(batch, visual_index=batch.visual_index[1:])
    with pytest.raises(ValueError, match=r"announces 4 visual tokens.*places for 3"):
        model(batch=short, head_fn=head(batch))


def test_contradicting_arguments_are_refused() -> None:
    model = small_model()
    ids = torch.tensor([[3, 4]])
    embeds = model.get_input_embeddings()(ids)
    pixels = torch.zeros(1, 3, 28, 28)
    with pytest.raises(RequestError, match="exactly one"):
        model(input_ids=ids, inputs_embeds=embeds)
    with pytest.raises(RequestError, match="either pixel_values or features"):
        model(input_ids=ids, pixel_values=pixels, features=model.encode_images(pixels))
    with pytest.raises(RequestError, match="images need input_ids"):
        model(inputs_embeds=embeds, pixel_values=pixels)
    with pytest.raises(ValueError, match="needs head_fn"):
        model(batch=packed_batch([[]]))
    with pytest.raises(ValueError, match="must be float32"):
        model.decode(embeds, torch.zeros(1, 2, dtype=torch.float64))


def test_features_made_before_equal_pixels() -> None:
    model = small_model()
    each = sample([1, 2])
    with torch.no_grad():
        features = model.encode_images(each.pixel_values)
        expected = model(input_ids=each.input_ids[None], pixel_values=each.pixel_values).logits
        got = model(input_ids=each.input_ids[None], features=features).logits
    assert torch.equal(got, expected)


def test_the_tower_sees_the_same_numbers_of_a_batch_and_of_a_plain_call() -> None:
    model = small_model()
    seen: list[torch.Tensor] = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    each = sample([2, 1])
    batch = pack([[each]])
    assert batch.tiles is not None
    assert batch.tiles.dtype == torch.uint8
    model(batch=batch, head_fn=head(batch))
    model(input_ids=each.input_ids[None], pixel_values=each.pixel_values)
    of_batch, plain = seen
    assert of_batch.dtype == torch.float32
    assert torch.equal(of_batch, plain)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_training_stays_close_to_float32(how: str) -> None:
    model = small_model()
    batch = packed_batch([[1], [2], []])
    exact = model(batch=batch, head_fn=head(batch)).detach()
    if how == "weights":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        rough = model(batch=batch, head_fn=head(batch))
    assert rough.dtype == torch.float32
    assert (rough.detach() - exact).abs().mean() < 0.05
    rough.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    model = small_model().train()
    batch = packed_batch([[1], [2]])
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(batch=batch, head_fn=head(batch)).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-5)


def test_a_text_body_that_is_not_called_through_the_model_says_so() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="call the composite model"):
        model.model.language_model(input_ids=torch.tensor([[3, 4]]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ps_version": "v3"}, "'v1' or 'v2'"),
        ({"vision_feature_layer": -2}, "last layer"),
        ({"increment": 2.0}, r"\(0, 1\]"),
    ],
)
def test_keys_that_mean_nothing_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(**keys)


def test_plain_transformers_obstacles() -> None:
    assert small_config().plain_transformers_obstacle is None
    assert "v1" in small_config(ps_version="v1").plain_transformers_obstacle
    auto = small_config(increment="auto", trained_context=100)
    assert "auto" in auto.plain_transformers_obstacle


@pytest.mark.parametrize(
    ("preset", "vision", "language", "tokens"),
    [
        (nano_config, (0.8e6, 1.2e6), (1.5e6, 2.5e6), 16),
        (micro_config, (2e6, 3e6), (3e6, 4.5e6), 16),
    ],
)
def test_presets_have_the_sizes_of_the_design(preset, vision, language, tokens: int) -> None:
    with torch.device("meta"):
        model = CascadeVLForConditionalGeneration(preset(2048, image_token_id=IMAGE))
    parts = (model.model.vision_tower, model.model.language_model)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert vision[0] < counts[0] < vision[1]
    assert language[0] < counts[1] < language[1]
    assert model.tokens_per_tile == model.config.image_seq_length == tokens
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_presets_take_keys_of_either_half() -> None:
    config = nano_config(100, vision_config={"num_hidden_layers": 2}, drop_path_rate=0.1)
    assert config.vision_config.num_hidden_layers == 2
    assert config.vision_config.hidden_size == 128
    assert config.drop_path_rate == 0.1


def test_first_weights_come_from_the_seed_alone() -> None:
    config = nano_config(
        100, vision_config={"num_hidden_layers": 1}, text_config={"num_hidden_layers": 1}
    )
    states = []
    for seed, noise in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(noise)
        model = CascadeVLForConditionalGeneration(config)
        before = torch.random.get_rng_state()
        initialise(model, seed, position_std=0.1, layer_scale=0.5)
        assert torch.equal(torch.random.get_rng_state(), before)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(states[0][name], states[2][name])
    table = states[0]["model.vision_tower.embeddings.position_embeddings"][0, 1:]
    assert table.square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-5)
    assert states[0]["model.vision_tower.encoder.layer.0.lambda_1"].eq(0.5).all()


def test_position_codes_tell_every_patch_apart_and_rows_from_columns() -> None:
    codes = sincos_positions(4, 16)
    assert len(torch.unique(codes, dim=0)) == 16
    grid = codes.view(4, 4, 16)
    assert torch.equal(grid[1, 0, :8], grid[1, 3, :8])  # the first half is the row's
    assert torch.equal(grid[0, 2, 8:], grid[3, 2, 8:])
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_positions(4, 6)
