"""Equal answers first: what bench_engine.py proves before it times anything."""

from __future__ import annotations

from typing import Any

import torch
from engine_peers import Case, Transformers
from transformers import (
    GptOssConfig,
    InternLM3Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import EngineConfig, ImageTiles, Request, TextIds
from cascadevl.engine.sampling import SamplingParams
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.presets import nano_config

_SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
}
_EXPERTS = {"head_dim": 16, "num_experts_per_tok": 2}
BODIES = {
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=16),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SHAPE, **_EXPERTS, num_experts=4, moe_intermediate_size=24
    ),
    "gpt_oss": lambda: GptOssConfig(**_SHAPE, **_EXPERTS, num_local_experts=4, sliding_window=9),
    "internlm2": lambda: LlamaConfig(**_SHAPE),
    "internlm3": lambda: InternLM3Config(**_SHAPE),
}


def prove_small_bodies() -> None:
    """Greedy tokens of a small model of every body in float32 are those of transformers."""
    for name, body in BODIES.items():
        torch.manual_seed(0)
        config = nano_config(128, image_token_id=7)
        config.text_config = body()
        model = CascadeVLForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.15)
        prompts = [torch.randint(8, 128, (1, length)) for length in (5, 40, 17)]
        how = SamplingParams(max_tokens=12, ignore_eos=True)
        answers = Engine(model, config=EngineConfig(num_pages=64)).generate(
            [Request(prompt=(TextIds(tuple(ids[0].tolist())),), sampling=how) for ids in prompts]
        )
        for ids, (answer,) in zip(prompts, answers, strict=True):
            output = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
            assert answer.token_ids == tuple(output[0, ids.shape[1] :].tolist()), name


def prove_within(
    model: CascadeVLForConditionalGeneration, peer: Transformers, case: Case, *, at_most: float
) -> float:
    """Feed the peer's greedy tokens to the engine; how far below its top logit they lie at most.

    Args:
        model: Ours.
        peer: With the same weights.
        case: Its first prompt is asked.
        at_most: The distance that is allowed.
    """
    said = peer.tokens(case)[0].tolist()
    engine = Engine(model, config=EngineConfig())
    every = int(model.config.text_config.vocab_size)
    how = SamplingParams(max_tokens=1, ignore_eos=True, logprobs=every)
    picture = ImageTiles(case.pictures[0])
    worst = 0.0
    for number, token in enumerate(said):
        text = (*case.questions[0], *said[:number])
        parts = (TextIds(case.before[0]), picture, TextIds(text))
        ((answer,),) = engine.generate([Request(prompt=parts, sampling=how)])
        assert answer.logprobs is not None
        top = dict(answer.logprobs[0].top)
        worst = max(worst, max(top.values()) - top[token])
    assert worst <= at_most, f"a token of the peer lies {worst:.3f} below our top logit"
    return worst
