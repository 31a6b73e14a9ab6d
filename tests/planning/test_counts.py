"""What is counted of a shape, by hand, and what services make of it."""

from __future__ import annotations

import pytest

from cascadevl.errors import ConfigError
from cascadevl.model.cost import Work, forward_flops, weight_bytes
from cascadevl.model.zoo import config_for
from cascadevl.planning.counts import Counts, count
from cascadevl.planning.hardware import HARDWARE, measured_core
from cascadevl.planning.service import ModelService, Question, Step

DENSE, EXPERTS = count(config_for("InternVL3.5-38B")), count(config_for("InternVL3.5-241B-A28B"))

ROUND = Counts(
    tile_flops=1e12,
    compressed_tile_flops=0.9e12,
    router_flops=0.05e12,
    token_flops=1e9,
    pair_flops=1e3,
    head_flops=1e8,
    vision_bytes=1e9,
    language_bytes=4e9,
    expert_bytes=0.0,
    expert_share=1.0,
    embedding_bytes=1e9,
    cache_bytes=1e5,
    feature_bytes=1e4,
    full_tokens=256,
    compressed_tokens=64,
)


def service(question: Question, **more: object) -> ModelService:
    core = measured_core(1e12, 1e10, 1e10)
    return ModelService(
        counts=ROUND, question=question, hardware=core, compute_share=0.5, memory_share=0.5, **more
    )


def test_a_prompt_put_together_costs_what_the_whole_forward_pass_does():
    config = config_for("InternVL3.5-38B")
    tiles, text = 5, 64
    tokens = text + tiles * DENSE.full_tokens
    pairs = tokens * (tokens + 1) // 2
    whole = forward_flops(config, Work(tokens=tokens, tiles=tiles, targets=1, pairs=pairs))
    parts = tiles * DENSE.tile_flops + tokens * DENSE.token_flops
    parts += pairs * DENSE.pair_flops + DENSE.head_flops
    assert parts == pytest.approx(whole.total, rel=1e-9)


def test_the_sizes_are_those_of_the_reports():
    assert DENSE.vision_bytes == pytest.approx(2 * 5.5e9, rel=0.03)
    assert DENSE.language_bytes == pytest.approx(2 * 32.8e9, rel=0.01)
    assert DENSE.read_bytes(1) == pytest.approx(DENSE.language_bytes - 2 * 151936 * 5120)
    assert (DENSE.full_tokens, DENSE.compressed_tokens) == (256, 64)


def test_one_token_reads_its_experts_and_many_read_all():
    config = config_for("InternVL3.5-241B-A28B")
    text = config.text_config
    layer = 3 * text.hidden_size * text.moe_intermediate_size
    experts = 2 * text.num_hidden_layers * text.num_experts * layer
    assert EXPERTS.expert_bytes == pytest.approx(experts, rel=1e-3)
    assert EXPERTS.expert_share == 8 / 128
    rest = weight_bytes(config).language + weight_bytes(config).head - experts
    rest -= 2 * text.vocab_size * text.hidden_size
    assert EXPERTS.read_bytes(1) == pytest.approx(rest + experts / 16, rel=1e-3)
    assert EXPERTS.read_bytes(2) == pytest.approx(rest + experts * (1 - (15 / 16) ** 2), rel=1e-3)
    assert EXPERTS.read_bytes(2000) == pytest.approx(rest + experts, rel=1e-3)


def test_visual_tokens_with_and_without_a_router():
    assert Question(tiles=5).visual_tokens(ROUND) == 1280
    assert Question(tiles=5, compressed_share=1.0).visual_tokens(ROUND) == 320
    assert Question(tiles=6, compressed_share=2 / 3).visual_tokens(ROUND) == 6 * 128
    assert Question(tiles=5, text_tokens=10).ask(ROUND).prompt_tokens == 1290


def test_seconds_by_hand():
    plain = service(Question(tiles=2), link_bytes_per_s=1e6)
    assert plain.encode_s(3) == pytest.approx(3e12 / 0.5e12)
    assert plain.transfer_s() == pytest.approx(2 * 256 * 1e4 / 1e6)
    routed = service(Question(tiles=2, compressed_share=0.5))
    assert routed.encode_s(2) == pytest.approx(2 * (1.05e12 - 0.05e12) / 0.5e12)
    prompt = Step(prompt_tokens=100, prompt_pairs=5050, first_tokens=1, answers=0, context_tokens=0)
    # Operations would take 0.2 s, reading 3 GB of weights takes 0.6 s.
    assert plain.step_s(prompt) == pytest.approx(3e9 / 0.5e10)
    long = Step(
        prompt_tokens=1000, prompt_pairs=10**6, first_tokens=2, answers=3, context_tokens=50
    )
    flops = 1003 * 1e9 + (10**6 + 50) * 1e3 + 5 * 1e8
    assert plain.step_s(long) == pytest.approx(flops / 0.5e12)
    assert service(Question(tiles=2), group=4).step_s(long) == pytest.approx(flops / 2e12)
    decode = Step(prompt_tokens=0, prompt_pairs=0, first_tokens=0, answers=8, context_tokens=9000)
    assert plain.step_s(decode) == pytest.approx((3e9 + 9000 * 1e5) / 0.5e10)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="at least 0, 1 and 1"):
        Question(tiles=1, new_tokens=0)
    with pytest.raises(ConfigError, match="compressed tiles is"):
        Question(tiles=1, compressed_share=1.5)
    with pytest.raises(ConfigError, match="above 0, at most 1"):
        ModelService(
            counts=ROUND, question=Question(tiles=1), hardware=HARDWARE["a100"], compute_share=1.2
        )
    with pytest.raises(ConfigError, match="flops_per_s is 0"):
        measured_core(0.0, 1.0, 1.0)
