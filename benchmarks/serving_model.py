"""The model that bench_serving.py serves: the proportions of InternVL3.5-38B, scaled down.

A tile of 448 px is 256 visual tokens, or 64 compressed; the vision half does about three quarters
of the operations that the language half does for a tile's tokens, as at 38B (45 layers of InternViT
against 64 of Qwen3; query heads 1.6 times, keys and values a fifth of the width). Heads are 128
wide, as there: a softmax takes time by the number of heads, which no count of operations knows.
Weights are random. The plain checkpoint opens in plain transformers; the other has a second
projector and a router beside the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import TilingConfig
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.flash import add_flash
from cascadevl.model.loading import save
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.presets import nano_config

_TEXTS = Path(__file__).parents[1] / "README.md"


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Two checkpoints of the same weights.

    Attributes:
        plain: Without a router.
        flash: With one.
        config: Of the plain one.
    """

    plain: Path
    flash: Path
    config: CascadeVLConfig


def write_checkpoints(folder: Path, *, tiny: bool = False) -> Checkpoints:
    """Write both.

    Args:
        folder: Gets them.
        tiny: A shape of a few operations in float32, whose greedy answers are the same whatever
            computes them.
    """
    tokenizer = build_tokenizer(_TEXTS.read_text(encoding="utf-8").splitlines(), 1024)
    vision = {"hidden_size": 256, "num_hidden_layers": 5, "num_attention_heads": 2}
    vision |= {"intermediate_size": 1024, "image_size": 448, "norm_type": "rms_norm"}
    vision |= {"use_qk_norm": True, "attention_bias": False}
    text = {"hidden_size": 512, "num_hidden_layers": 7, "num_attention_heads": 6}
    text |= {"num_key_value_heads": 1, "head_dim": 128, "intermediate_size": 2560}
    if tiny:
        vision |= {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
        vision |= {"image_size": 112}
        text |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        text |= {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128}
    processor = CascadeVLProcessor(
        tokenizer, tiling=TilingConfig(tile_px=int(vision["image_size"])), tokens_per_tile=1
    )
    config = nano_config(
        len(tokenizer),
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
        vision_config=vision,
        text_config={**text, "tie_word_embeddings": False},
    )
    processor = CascadeVLProcessor(
        tokenizer,
        tiling=TilingConfig(tile_px=config.tile_px),
        tokens_per_tile=config.tokens_per_tile,
    )
    torch.manual_seed(0)
    model = CascadeVLForConditionalGeneration(config)
    model = model.to(torch.float32 if tiny else torch.bfloat16).eval()
    save(model, processor, folder / "plain")
    add_flash(model, seed=1, num_heads=4)
    save(model, processor, folder / "flash")
    return Checkpoints(folder / "plain", folder / "flash", config)
