"""The model against transformers' own InternVL on random weights, in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GptOssConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.internvl import InternVLVisionConfig

from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.modeling import CascadeVLForConditionalGeneration

IMAGE, VOCAB, PX = 7, 97, 28
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
TEXT = {
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen2 dynamic rope": lambda: Qwen2Config(
        **SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "qwen2 windows": lambda: Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=16),
    "qwen3 tied": lambda: Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "gpt_oss": lambda: GptOssConfig(
        **SMALL, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=9
    ),
    "llama": lambda: LlamaConfig(**SMALL),
}
VISION = {
    "300M": {"attention_bias": True, "norm_type": "layer_norm", "use_qk_norm": False},
    "6B": {"attention_bias": False, "norm_type": "rms_norm", "use_qk_norm": True},
}
# Tiles of every image in every row; a row without images is text alone.
IMAGES = {
    "one tile": [[1]],
    "thirteen tiles": [[13]],
    "several images": [[2, 1, 3], [1, 4]],
    "text only": [[], []],
}


def config_of(text: str, vision: str) -> dict:
    text_config = TEXT[text]()
    vision_config = InternVLVisionConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=PX,
        patch_size=7,
        **VISION[vision],
    )
    return {
        "vision_config": vision_config,
        "text_config": text_config,
        "image_token_id": IMAGE,
        "image_seq_length": 4,
        "tie_word_embeddings": bool(text_config.tie_word_embeddings),
    }


def both_models(
    text: str, vision: str, **ours: object
) -> tuple[InternVLForConditionalGeneration, CascadeVLForConditionalGeneration]:
    """transformers' model with random weights everywhere, and ours with the same."""
    torch.manual_seed(0)
    config = config_of(text, vision)
    theirs = InternVLForConditionalGeneration(CascadeVLConfig(**config)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # position embeddings and biases too
            parameter.copy_(torch.randn_like(parameter) * 0.15)
    mine = CascadeVLForConditionalGeneration(CascadeVLConfig(**config_of(text, vision), **ours))
    mine.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, mine.eval()


def request(rows: list[list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts with images of so many tiles, padded on the left to one length."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for row in rows:
        ids = torch.randint(8, VOCAB, (5,), generator=generator).tolist()
        for tiles in row:
            ids += [IMAGE] * (4 * tiles)
            ids += torch.randint(8, VOCAB, (3 + tiles,), generator=generator).tolist()
        prompts.append(ids)
    width = max(map(len, prompts))
    tiles = sum(map(sum, rows))
    inputs = {
        "input_ids": torch.tensor([[1] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }
    if tiles:
        inputs["pixel_values"] = torch.randn(tiles, 3, PX, PX, generator=generator)
    return inputs


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("text", TEXT)
def test_logits_and_greedy_tokens_equal_transformers(text: str, vision: str) -> None:
    theirs, mine = both_models(text, vision)
    for name, rows in IMAGES.items():
        inputs = request(rows)
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            expected, got = theirs(**inputs).logits, mine(**inputs).logits
        torch.testing.assert_close(
            got[real], expected[real], rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        torch.testing.assert_close(
            mine.generate(**inputs, **settings), theirs.generate(**inputs, **settings)
        )


@pytest.mark.parametrize("text", ["qwen3", "gpt_oss", "qwen2 windows"])
def test_loss_and_gradients_equal_transformers(text: str) -> None:
    theirs, mine = both_models(text, "300M")
    inputs = request([[2, 1], [1]])
    labels = torch.where(inputs["input_ids"] > 20, inputs["input_ids"], -100)
    expected, got = (m(**inputs, labels=labels, use_cache=False).loss for m in (theirs, mine))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    expected.backward()
    got.backward()
    grads = dict(theirs.named_parameters())
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(
            parameter.grad,
            grads[name].grad,
            rtol=1e-4,
            atol=1e-6,
            msg=lambda t, n=name: f"{n}: {t}",
        )


def test_the_parameter_names_are_those_of_transformers() -> None:
    for text in ("qwen3 tied", "qwen3_moe"):
        theirs, mine = both_models(text, "6B")
        assert list(mine.state_dict()) == list(theirs.state_dict())
        assert [n for n, _ in mine.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def test_a_saved_model_opens_in_plain_transformers_and_comes_back(tmp_path: object) -> None:
    theirs, mine = both_models("qwen3", "300M", trained_context=64)
    mine.save_pretrained(tmp_path)
    opened = InternVLForConditionalGeneration.from_pretrained(tmp_path).eval()
    back = CascadeVLForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert back.config.trained_context == 64
    inputs = request([[1]])
    with torch.no_grad():
        expected = theirs(**inputs).logits
        torch.testing.assert_close(opened(**inputs).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(back(**inputs).logits, expected, rtol=0, atol=1e-5)


def test_a_static_cache_gives_the_same_tokens() -> None:
    _, mine = both_models("gpt_oss", "300M")
    inputs = request([[2, 1], [1]])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = mine.generate(**inputs, **settings)
    static = mine.generate(
        **inputs, **settings, cache_implementation="static", disable_compile=True
    )
    torch.testing.assert_close(static, expected)


def test_logits_to_keep() -> None:
    _, mine = both_models("qwen3", "300M")
    inputs = request([[1], [2]])
    with torch.no_grad():
        every = mine(**inputs).logits
        torch.testing.assert_close(mine(**inputs, logits_to_keep=1).logits, every[:, -1:])
        index = torch.tensor([0, 5])
        torch.testing.assert_close(mine(**inputs, logits_to_keep=index).logits, every[:, index])
