"""What the parts of a request cost, counted from the shape of a model (`cascadevl.model.cost`)."""

from __future__ import annotations

from dataclasses import dataclass

from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.cost import (
    Work,
    cache_bytes,
    forward_flops,
    router_flops,
    weight_bytes,
)

_ENTRY_BYTES = 2  # BF16


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Operations and bytes of a model in BF16.

    Attributes:
        tile_flops: The vision tower and the projector, for a tile that stays full.
        compressed_tile_flops: The same for a compressed one.
        router_flops: The router, for a tile.
        token_flops: The layers of the language model, for a token, without attention.
        pair_flops: Attention, for a query and a key; layers with a window count as all others.
        head_flops: The head, for a token.
        vision_bytes: Weights of the vision half.
        language_bytes: Weights of the language half, token embedding and head included.
        expert_bytes: Of these, experts that are read only if a token has chosen them.
        expert_share: Of these, what one token reads; 1 without experts.
        embedding_bytes: Of the language half's weights, the table that nobody reads as a whole.
        cache_bytes: Keys and values of a token.
        feature_bytes: A visual token on its way between the halves.
        full_tokens: Visual tokens of a full tile.
        compressed_tokens: Visual tokens of a compressed one.
    """

    tile_flops: float
    compressed_tile_flops: float
    router_flops: float
    token_flops: float
    pair_flops: float
    head_flops: float
    vision_bytes: float
    language_bytes: float
    expert_bytes: float
    expert_share: float
    embedding_bytes: float
    cache_bytes: float
    feature_bytes: float
    full_tokens: int
    compressed_tokens: int

    def read_bytes(self, tokens: int) -> float:
        """Weights of the language half that a step reads.

        Tokens are taken to choose their experts independently of each other.

        Args:
            tokens: Of the step.
        """
        chosen = 1.0 - (1.0 - self.expert_share) ** tokens
        unread = self.embedding_bytes + self.expert_bytes * (1.0 - chosen)
        return self.language_bytes - unread


def count(config: CascadeVLConfig) -> Counts:
    """Count the parts of a shape.

    Args:
        config: The shape. Its compressed tiles are counted whether it has a router or not, so that
            a router can be planned for.
    """
    text = config.text_config
    full = forward_flops(config, Work(tokens=0, tiles=1))
    compressed = forward_flops(config, Work(tokens=0, tiles=1, compressed_tiles=1))
    token = forward_flops(config, Work(tokens=1, targets=1))
    pair = forward_flops(config, Work(tokens=1, pairs=1))
    weights = weight_bytes(config, entry_bytes=_ENTRY_BYTES)
    table = _ENTRY_BYTES * float(text.vocab_size * text.hidden_size)
    share = _expert_share(config)
    # A token multiplies all that is not an expert, and its share of the experts.
    used = token.language / 2 * _ENTRY_BYTES
    experts = 0.0 if share == 1 else (weights.language - used) / (1.0 - share)
    return Counts(
        tile_flops=full.vision + full.projector,
        compressed_tile_flops=compressed.vision + compressed.projector,
        router_flops=router_flops(config, 1),
        token_flops=token.language,
        pair_flops=pair.language - token.language,
        head_flops=token.head,
        vision_bytes=weights.vision + weights.projector,
        language_bytes=weights.language + weights.head,
        expert_bytes=experts,
        expert_share=share,
        embedding_bytes=0.0 if config.tie_word_embeddings else table,
        cache_bytes=float(cache_bytes(config, 1, entry_bytes=_ENTRY_BYTES)),
        feature_bytes=float(_ENTRY_BYTES * text.hidden_size),
        full_tokens=config.tokens_per_tile,
        compressed_tokens=config.compressed_tokens,
    )


def _expert_share(config: CascadeVLConfig) -> float:
    """Share of the experts of a layer that a token chooses."""
    text = config.text_config
    if text.model_type == "gpt_oss":
        return float(text.num_experts_per_tok) / float(text.num_local_experts)
    if text.model_type == "qwen3_moe":
        return float(text.num_experts_per_tok) / float(text.num_experts)
    return 1.0
