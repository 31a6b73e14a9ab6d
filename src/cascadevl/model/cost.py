"""What a shape costs: parameters, floating point operations and bytes, by formula.

Planning a run, a server or a benchmark needs these figures for models that do not fit the machine
that plans. Only matrix products are counted as operations, a multiplication and an addition each;
what is computed twice (checkpointed layers, chunks of the head) counts once, so that operations
over time is the share of a machine that is put to use.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from cascadevl.model.configuration import CascadeVLConfig

Part: TypeAlias = Literal["vision", "projector", "language"]

_ROUTER_LAYERS = 4  # of attention, and as many blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one call of the model takes in.

    Attributes:
        tokens: Tokens of the language half, visual ones included.
        tiles: Tiles of the vision half.
        compressed_tiles: Those of them that a router has compressed.
        targets: Tokens whose logits are computed.
        pairs: Pairs of a query and a key that it sees, over all segments (`causal_pairs`).
    """

    tokens: int
    tiles: int = 0
    compressed_tiles: int = 0
    targets: int = 0
    pairs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A figure for each part of the model; the head and its embedding stand apart.

    Attributes:
        vision: The vision tower.
        projector: The projector; of parameters, also a Flash model's second one and its router.
        language: The layers of the text body.
        head: The language head; of parameters, also the token embedding.
    """

    vision: float = 0.0
    projector: float = 0.0
    language: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        """All parts together."""
        return self.vision + self.projector + self.language + self.head

    def __add__(self, other: Cost) -> Cost:
        """The sum, part by part."""
        return Cost(
            vision=self.vision + other.vision,
            projector=self.projector + other.projector,
            language=self.language + other.language,
            head=self.head + other.head,
        )


@dataclass(frozen=True, slots=True)
class _Layer:
    """Parameters of a layer: all of them, and the entries of matrices that a token multiplies."""

    stored: int
    used: int


def causal_pairs(lengths: Iterable[int]) -> int:
    """Pairs that causal attention needs for samples of these lengths."""
    return sum(length * (length + 1) // 2 for length in lengths)


def parameter_counts(config: CascadeVLConfig) -> Cost:
    """Parameters of each part; a head tied to the embedding is counted once."""
    text, vision = config.text_config, config.vision_config
    table = text.vocab_size * text.hidden_size
    width = vision.hidden_size
    patch = 3 * vision.patch_size[0] * vision.patch_size[1]
    embeddings = patch * width + width
    embeddings += (_patches(config) + 2) * width  # positions, the class token's too, and itself
    return Cost(
        vision=float(embeddings + vision.num_hidden_layers * _vision_layer(vision).stored),
        projector=float(sum(_projector(config)) + _flash_parameters(config)),
        language=float(text.num_hidden_layers * _text_layer(text).stored + text.hidden_size),
        head=float(table * (1 if config.tie_word_embeddings else 2)),
    )


def forward_flops(config: CascadeVLConfig, work: Work) -> Cost:
    """Floating point operations of the forward pass."""
    text, vision = config.text_config, config.vision_config
    patches = _patches(config)
    seen = patches + 1  # the class token
    entries = _vision_layer(vision).used * seen + 2 * vision.hidden_size * seen**2
    patch = 3 * vision.patch_size[0] * vision.patch_size[1] * vision.hidden_size
    full = (work.tiles - work.compressed_tiles) * config.tokens_per_tile * _projector(config)[0]
    compressed = work.compressed_tiles * config.compressed_tokens * _compressed_projector(config)[0]
    return Cost(
        vision=2.0 * work.tiles * (vision.num_hidden_layers * entries + patch * patches),
        projector=2.0 * (full + compressed),
        language=2.0 * text.num_hidden_layers * _text_layer(text).used * work.tokens
        + _attention_flops(text, work),
        head=2.0 * text.vocab_size * text.hidden_size * work.targets,
    )


def router_flops(config: CascadeVLConfig, tiles: int) -> float:
    """Floating point operations of the router for so many tiles.

    One query goes through each layer of attention, so patches are only weighed and averaged
    (`cascadevl.model.router.PoolingLayer`). That of the first layer is the same for all tiles.
    """
    width, heads = config.vision_config.hidden_size, config.flash_heads
    attention = 4 * width**2 + 2 * heads * width * _patches(config)
    tile = _ROUTER_LAYERS * (attention + 8 * width**2) + 2 * width
    return float(2 * (tiles * tile - max(tiles - 1, 0) * 2 * width**2))


def backward_flops(config: CascadeVLConfig, work: Work, *, frozen: Collection[Part] = ()) -> Cost:
    """Floating point operations of the backward pass.

    A product costs twice its forward pass where both its weight and its input want a gradient, and
    once where only the input does; a part costs nothing if nothing before it is trained either.

    Args:
        config: The shape.
        work: What went through it.
        frozen: Parts without gradients.
    """
    forward = forward_flops(config, work)
    vision = config.vision_config
    trained = {part: part not in frozen for part in ("vision", "projector", "language")}
    pixels = 3 * vision.patch_size[0] * vision.patch_size[1] * vision.hidden_size
    pixels *= 2 * work.tiles * _patches(config)  # nobody asks for the gradient of the pixels
    visual = work.tiles > 0 and (trained["vision"] or trained["projector"])
    attention = _attention_flops(config.text_config, work)
    products = forward.language - attention
    passes = 1.0 + trained["language"] if visual or trained["language"] else 0.0
    return Cost(
        vision=2 * forward.vision - pixels if trained["vision"] else 0.0,
        projector=forward.projector * ((2.0 if trained["projector"] else 1.0) if visual else 0.0),
        language=passes * products + (2 * attention if passes else 0.0),
        head=passes * forward.head,
    )


def step_flops(config: CascadeVLConfig, work: Work, *, frozen: Collection[Part] = ()) -> Cost:
    """Floating point operations of a training step: forward and backward pass."""
    return forward_flops(config, work) + backward_flops(config, work, frozen=frozen)


def weight_bytes(config: CascadeVLConfig, *, entry_bytes: int = 2) -> Cost:
    """Bytes of the weights; entries of 2 bytes are bfloat16."""
    counts = parameter_counts(config)
    return Cost(
        vision=entry_bytes * counts.vision,
        projector=entry_bytes * counts.projector,
        language=entry_bytes * counts.language,
        head=entry_bytes * counts.head,
    )


def cache_bytes(config: CascadeVLConfig, num_tokens: int, *, entry_bytes: int = 2) -> int:
    """Bytes of the keys and values that so many tokens leave, sliding windows left out."""
    text = config.text_config
    entries = 2 * text.num_key_value_heads * _head_dim(text)
    return int(entry_bytes * entries * text.num_hidden_layers * num_tokens)


def state_bytes(config: CascadeVLConfig, *, frozen: Collection[Part] = ()) -> Cost:
    """Bytes of bfloat16 weights in training with float32 masters and AdamW's two moments.

    A trained parameter takes 16 bytes: weight 2, gradient 2, master 4, moments 8; a frozen one 2.
    A second micro-batch, or a second process, adds 2 for a float32 gradient.
    """
    counts = parameter_counts(config)

    def each(part: Part) -> int:
        return 2 if part in frozen else 16

    return Cost(
        vision=each("vision") * counts.vision,
        projector=each("projector") * counts.projector,
        language=each("language") * counts.language,
        head=each("language") * counts.head,
    )


def activation_bytes(
    config: CascadeVLConfig, work: Work, *, recompute: bool = False, head_chunk: int | None = None
) -> Cost:
    """Bytes that the backward pass of a bfloat16 model finds saved, everything trained.

    What the bodies keep, operation by operation: a normalisation and a linear layer their input,
    attention queries, keys and values, a gate both factors. Probabilities of
    attention are not in it (`cascadevl.model.layout.AttentionTable` bounds them), nor is what
    operations need while they run.

    Args:
        config: The shape.
        work: What goes through it.
        recompute: Whether layers are checkpointed: their inputs are kept, and one layer whole.
        head_chunk: Targets whose logits and their gradient exist at once; None for all.
    """
    text, vision = config.text_config, config.vision_config
    seen = work.tiles * (_patches(config) + 1)
    patch_bytes, token_bytes = _vision_activations(vision), _text_activations(text)
    joined = vision.hidden_size * round(1 / config.downsample_ratio) ** 2
    chunk = work.targets if head_chunk is None else min(work.targets, head_chunk)
    return Cost(
        vision=seen
        * _kept(patch_bytes, 2 * vision.hidden_size, vision.num_hidden_layers, recompute),
        projector=work.tiles * config.tokens_per_tile * 4.0 * (joined + text.hidden_size),
        language=work.tokens
        * (
            _kept(token_bytes, 2 * text.hidden_size, text.num_hidden_layers, recompute)
            + 4.0 * text.hidden_size  # the last normalisation
        ),
        head=4.0 * chunk * text.vocab_size + 2.0 * work.targets * text.hidden_size,
    )


def _kept(layer: int, layer_input: int, num_layers: int, recompute: bool) -> float:
    """Bytes of all layers: whole, or their inputs and the one that is computed again."""
    return float(layer + num_layers * layer_input if recompute else num_layers * layer)


def _text_activations(text: Any) -> int:
    """Bytes a token leaves in a layer of the text body."""
    hidden, dim = text.hidden_size, _head_dim(text)
    query, key = text.num_attention_heads * dim, text.num_key_value_heads * dim
    kept = 2 * 4 * hidden + 2 * (query + 2 * key) + 2 * query
    if text.model_type.startswith("qwen3"):
        kept += 2 * (query + key)
    experts = getattr(text, "num_experts_per_tok", None)
    if experts:
        width = getattr(text, "moe_intermediate_size", text.intermediate_size)
        return int(kept + experts * (8 * width + 4 * hidden))
    return int(kept + 8 * text.intermediate_size)


def _vision_activations(vision: Any) -> int:
    """Bytes a patch leaves in a layer of the vision tower."""
    norms = 2 * 2 if vision.use_qk_norm else 0
    return int((20 + norms) * vision.hidden_size + 4 * vision.intermediate_size)


def _patches(config: CascadeVLConfig) -> int:
    return int(config.tile_px // int(config.vision_config.patch_size[0])) ** 2


def _vision_layer(vision: Any) -> _Layer:
    width, inner = vision.hidden_size, vision.intermediate_size
    used = 4 * width * width + 2 * width * inner
    norms = (2 if vision.norm_type == "layer_norm" else 1) * 2 * width
    biases = width + inner + width + (3 * width if vision.attention_bias else 0)
    scales = 2 * width + (2 * width if vision.use_qk_norm else 0)
    return _Layer(used + norms + biases + scales, used)


def _projector(config: CascadeVLConfig) -> tuple[int, int]:
    """Entries of the projector's matrices, and of everything else it has."""
    width = config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2
    hidden = config.text_config.hidden_size
    return width * hidden + hidden * hidden, 2 * width + 2 * hidden


def _compressed_projector(config: CascadeVLConfig) -> tuple[int, int]:
    """The same of a Flash model's second projector."""
    width = config.vision_config.hidden_size * round(1 / config.flash_downsample_ratio) ** 2
    hidden = config.text_config.hidden_size
    return 2 * width * hidden + 6 * hidden**2, 2 * width + 5 * hidden


def _flash_parameters(config: CascadeVLConfig) -> int:
    """Parameters of the second projector and of the router; 0 of a model without them."""
    if not config.flash_mode:
        return 0
    width = config.vision_config.hidden_size
    attention = 4 * width**2 + 4 * width + 2 * width  # with biases and the normalisation
    block = 8 * width**2 + 5 * width + 2 * width
    gate = 2 * width + 2 * width + 2
    router = _ROUTER_LAYERS * (attention + block) + width + gate
    return int(sum(_compressed_projector(config)) + router)


def _head_dim(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _text_layer(text: Any) -> _Layer:
    hidden, dim, kind = text.hidden_size, _head_dim(text), text.model_type
    query, key = text.num_attention_heads * dim, text.num_key_value_heads * dim
    mlp_stored, mlp_used = _mlp(text)
    used = 2 * hidden * query + 2 * hidden * key + mlp_used
    stored = 2 * hidden * query + 2 * hidden * key + mlp_stored + 2 * hidden
    if kind.startswith("qwen3"):
        stored += 2 * dim  # norms of queries and keys
    if kind == "gpt_oss":
        stored += text.num_attention_heads  # sinks
    if kind == "qwen2" or getattr(text, "attention_bias", False):
        stored += query + 2 * key + (0 if kind == "qwen2" else hidden)
    return _Layer(stored, used)


def _mlp(text: Any) -> tuple[int, int]:
    """Entries of a layer's network, all experts, and those that a token multiplies."""
    hidden = text.hidden_size
    if text.model_type == "gpt_oss":
        experts, width = text.num_local_experts, text.intermediate_size
        router = hidden * experts
        one = 3 * hidden * width
        stored = experts * (one + 2 * width + hidden) + router + experts
        return stored, text.num_experts_per_tok * one + router
    if text.model_type == "qwen3_moe":
        router, one = hidden * text.num_experts, 3 * hidden * text.moe_intermediate_size
        return text.num_experts * one + router, text.num_experts_per_tok * one + router
    used = 3 * hidden * text.intermediate_size
    biases = 2 * text.intermediate_size + hidden if getattr(text, "mlp_bias", False) else 0
    return used + biases, used


def _attention_flops(text: Any, work: Work) -> float:
    """Scores and weighted values of the text body; a window bounds what a token sees."""
    flops = 0.0
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None)
    few = work.pairs if window is None else min(work.pairs, work.tokens * window)
    for kind in kinds:
        pairs = work.pairs if kind == "full_attention" else few
        flops += 4.0 * text.num_attention_heads * _head_dim(text) * pairs
    return flops
