"""Costs by formula against built models, torch's own counter, and a sum on paper."""

from __future__ import annotations

import pytest
import torch
from tests.model.bodies import BODIES, body_model
from tests.model.small import IMAGE, PX, TOKENS_PER_TILE, VOCAB, small_flash_model, small_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import InternVLForConditionalGeneration

from cascadevl.model import cost
from cascadevl.model.cost import Cost, Work
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.zoo import ZOO, config_for
from cascadevl.types import NO_PARENT, Batch

PARTS: tuple[cost.Part, ...] = ("vision", "projector", "language")


def counted(model: torch.nn.Module) -> Cost:
    """Parameters of a built model, part by part."""
    sums = dict.fromkeys((*PARTS, "head"), 0.0)
    for name, parameter in model.named_parameters():
        part = "vision" if "vision_tower" in name else "language"
        between = ("multi_modal_projector", "compressed_projector", "model.router.")
        part = "projector" if any(each in name for each in between) else part
        part = "head" if "lm_head" in name or "embed_tokens" in name else part
        sums[part] += parameter.numel()
    return Cost(**sums)


@pytest.mark.parametrize("name", ZOO)
def test_parameters_of_every_released_size(name: str) -> None:
    config = config_for(name)
    with torch.device("meta"):
        kind = CascadeVLForConditionalGeneration if config.flash_mode else None
        model = (kind or InternVLForConditionalGeneration)(config)
    assert cost.parameter_counts(config) == counted(model)


@pytest.mark.parametrize("name", BODIES)
def test_parameters_of_small_bodies_also_tied(name: str) -> None:
    for tied in (False, True):
        model = body_model(name, tie_word_embeddings=tied)
        assert cost.parameter_counts(model.config) == counted(model)


def batch_of(tiles: int, tokens: int, targets: int) -> Batch:
    """One row: visual tokens first, the last tokens are to be predicted."""
    visual = tiles * TOKENS_PER_TILE
    ids = torch.arange(tokens)[None] % (VOCAB - IMAGE - 1) + IMAGE + 1
    ids[0, :visual] = IMAGE
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(tokens).float()[None],
        segments=torch.zeros_like(ids),
        parents=torch.full_like(ids, NO_PARENT),
        tiles=torch.ones(tiles, PX, PX, 3, dtype=torch.uint8) if tiles else None,
        tokens_per_tile=torch.full((tiles,), TOKENS_PER_TILE),
        visual_index=torch.arange(visual),
        target_index=torch.arange(tokens - targets - 1, tokens - 1),
        target_ids=ids[0, tokens - targets :],
        target_weights=torch.ones(targets),
        target_samples=torch.zeros(targets, dtype=torch.int64),
        sources=("row",),
    )


def score(logits: Tensor, place: slice) -> Tensor:
    return logits.float().square().mean(-1)


@pytest.mark.parametrize("tiles", [0, 3])
@pytest.mark.parametrize(
    "frozen", [(), ("vision",), ("vision", "projector"), ("language",), ("vision", "language")]
)
def test_operations_equal_torchs_counter_whatever_is_frozen(
    tiles: int, frozen: tuple[cost.Part, ...]
) -> None:
    if tiles == 0 and "language" in frozen:
        return  # nothing to differentiate
    model = small_model().train()
    model.freeze(**{part: part in frozen for part in PARTS})
    # The counter does not look into our operator of attention: no pairs.
    work = Work(tokens=29, tiles=tiles, targets=9)
    with FlopCounterMode(display=False) as forward:
        loss = model(batch=batch_of(tiles, 29, 9), head_fn=score).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward.get_total_flops() == cost.forward_flops(model.config, work).total
    assert backward.get_total_flops() == (
        cost.backward_flops(model.config, work, frozen=frozen).total
    )


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "internlm3", "qwen3_moe"])
def test_operations_of_attention_and_of_experts_equal_torchs_counter(name: str) -> None:
    config = body_model(name).config
    config.text_config._experts_implementation = "eager"
    model = InternVLForConditionalGeneration._from_config(config, attn_implementation="eager")
    ids = torch.arange(8, 31)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    work = Work(tokens=23, targets=23, pairs=23**2)  # eager attention computes the masked ones too
    assert counter.get_total_flops() == cost.forward_flops(config, work).total


@pytest.mark.parametrize("compressed", [0, 2, 3])
def test_operations_of_compressed_tiles_and_of_the_router_equal_torchs_counter(
    compressed: int,
) -> None:
    model = small_flash_model()
    tiles = 3
    counts = torch.tensor([1] * compressed + [TOKENS_PER_TILE] * (tiles - compressed))
    work = Work(tokens=0, tiles=tiles, compressed_tiles=compressed)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.encode(torch.ones(tiles, PX, PX, 3, dtype=torch.uint8), counts)
    assert counter.get_total_flops() == cost.forward_flops(model.config, work).total
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.router(torch.ones(tiles, 16, 24))
    assert counter.get_total_flops() == cost.router_flops(model.config, tiles)


@pytest.mark.parametrize("name", ["InternVL3.5-1B-Flash", "InternVL3.5-38B-Flash"])
def test_the_router_is_a_small_part_of_the_vision_tower(name: str) -> None:
    config = config_for(name)
    tower = cost.forward_flops(config, Work(tokens=0, tiles=13)).vision
    assert cost.router_flops(config, 13) < 0.001 * tower


def test_a_tile_of_the_1b_shape_on_paper() -> None:
    config = config_for("InternVL3-1B")
    layer = 2 * 1025 * (4 * 1024**2 + 2 * 1024 * 4096) + 2 * 2 * 1025**2 * 1024
    patches = 2 * 1024 * (3 * 14 * 14) * 1024
    found = cost.forward_flops(config, Work(tokens=0, tiles=1))
    assert found.vision == 24 * layer + patches
    assert found.projector == 2 * 256 * (4096 * 896 + 896 * 896)
    assert found.total == pytest.approx(726e9, rel=1e-3)


def test_windows_bound_what_a_token_sees() -> None:
    config = body_model("qwen2 windows").config  # one of two layers sees 9 tokens
    work = Work(tokens=100, pairs=cost.causal_pairs([100]))
    used = cost.forward_flops(config, Work(tokens=100)).total
    pairs = 100 * 101 // 2 + 100 * 9
    assert cost.forward_flops(config, work).total - used == 4 * 4 * 8 * pairs


def test_pairs_by_counting() -> None:
    lengths = (1, 4, 7)
    assert cost.causal_pairs(lengths) == sum(
        key <= query for length in lengths for query in range(length) for key in range(length)
    )


def test_bytes_of_weights_state_and_cache() -> None:
    model = small_model()
    count = sum(parameter.numel() for parameter in model.parameters())
    head = 2 * VOCAB * 32
    language = sum(p.numel() for p in model.model.language_model.layers.parameters()) + 32 + head
    assert cost.weight_bytes(model.config).total == 2 * count
    assert cost.state_bytes(model.config).total == 16 * count
    frozen = cost.state_bytes(model.config, frozen=("language",))
    assert frozen.total == 16 * (count - language) + 2 * language
    assert cost.cache_bytes(model.config, 5) == 5 * 2 * 2 * (2 * 16) * 2  # k and v, layers, heads


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_what_autograd_saves(recompute: bool) -> None:
    text = {"hidden_size": 96, "intermediate_size": 200, "vocab_size": 700}
    model = small_model(text=text).bfloat16().train()
    if recompute:
        model.activation_checkpointing_enable()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tiles, tokens = 12, 600
    batch = batch_of(tiles, tokens, 40)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batch=batch, head_fn=score).sum()
    work = Work(tokens=tokens, tiles=tiles, targets=40)
    found = cost.activation_bytes(model.config, work, recompute=recompute).total
    whole = cost.activation_bytes(model.config, work)
    if recompute:  # one layer of each half is not there before the backward pass
        found -= whole.vision / 3 + (whole.language - 4 * 96 * tokens) / 2
    else:
        layout = model.model.layout(batch.segments, batch.parents)
        found += 2 * 4 * 2 * len(layout.of(None).short_cells)  # probabilities: layers, heads, bytes
    assert sum(saved.values()) == pytest.approx(found, rel=0.1)
    del loss
