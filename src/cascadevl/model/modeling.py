"""The composite model: what training, inference and transformers' tools call.

Training makes one call, ``forward(batch=, head_fn=)``; inference may use the two halves,
`encode_images` and `decode`, or `forward` and `generate` as in transformers. The parameters have
the names that transformers' `InternVLForConditionalGeneration` gives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.internvl.modeling_internvl import (
    InternVLCausalLMOutputWithPast,
    InternVLPreTrainedModel,
)

from cascadevl.errors import RequestError
from cascadevl.model.backbone import CascadeVLModel
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.drop_path import dropout_off
from cascadevl.model.head import HeadFn, score_targets
from cascadevl.model.masks import inferred_mask, is_empty, row_segments
from cascadevl.model.routed_prompts import routes_of_rows, shortened, with_prompts
from cascadevl.model.routing import VisualBudget, budget_for
from cascadevl.model.v2pe import prompt_positions, resolve_increments
from cascadevl.types import NO_PARENT, Batch, VisualFeatures


class CascadeVLForConditionalGeneration(InternVLPreTrainedModel, GenerationMixin):
    """The model with its language head."""

    config: CascadeVLConfig
    config_class = CascadeVLConfig
    model: CascadeVLModel
    lm_head: nn.Linear
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: CascadeVLConfig) -> None:
        """Build the model with random weights."""
        super().__init__(config)
        self.model = CascadeVLModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile at full resolution."""
        return self.config.tokens_per_tile

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding of the text body."""
        embedding: nn.Module = self.model.language_model.get_input_embeddings()
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding of the text body."""
        self.model.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language head."""
        head: nn.Module = self.lm_head
        return head

    def freeze(
        self,
        *,
        vision: bool = False,
        projector: bool = False,
        language: bool = False,
        router: bool = True,
    ) -> None:
        """Choose what is trained: the named parts get no gradient, all others do.

        A head that is tied to the token embedding belongs to the language part, as does an own;
        the projector of compressed tiles belongs to the projector. The router is frozen unless
        asked for, because no loss but its own reaches it.
        """
        parts = {
            self.model.vision_tower: vision,
            self.model.multi_modal_projector: projector,
            self.model.compressed_projector: projector,
            self.model.router: router,
            self.model.language_model: language,
            self.lm_head: language,
        }
        for part, frozen in parts.items():
            if part is not None:
                part.requires_grad_(not frozen)

    @contextmanager
    def no_drop_path(self) -> Iterator[None]:
        """Switch drop path and all dropout off inside, in training mode too.

        Log-probabilities need it (design decision 5). It may stay open over a whole run: putting
        the model into training mode changes nothing, and layers that are computed again in the
        backward pass (gradient checkpointing) drop nothing either.
        """
        with dropout_off(self), self.model.drop_path.pause():
            yield

    def forward(
        self,
        input_ids: Int64[Tensor, "rows tokens"] | None = None,
        pixel_values: Float[Tensor, "tiles 3 px px"] | None = None,
        attention_mask: Int[Tensor, "rows keys"] | Bool[Tensor, "rows keys"] | None = None,
        position_ids: Float[Tensor, "#rows tokens"] | Int[Tensor, "#rows tokens"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "rows tokens hidden"] | None = None,
        labels: Int64[Tensor, "rows tokens"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        increments: float | Sequence[float] | None = None,
        features: VisualFeatures | None = None,
        tokens_per_tile: Sequence[int] | Int64[Tensor, " tiles"] | None = None,
        return_dict: bool | None = None,
        *,
        batch: Batch | None = None,
        head_fn: HeadFn | None = None,
    ) -> Tensor | InternVLCausalLMOutputWithPast:
        """Compute one number a target of a packed batch; or, as transformers does, logits.

        Args:
            input_ids: Token ids, image slots expanded; or ``inputs_embeds`` instead.
            pixel_values: Normalised tiles of all images, in the order of their tokens, as the
                released processors make them; a batch brings its own, not normalised.
            attention_mask: Nonzero where a token is real, those in the cache first. Rows may be
                padded on either side.
            position_ids: Where the tokens sit; worked out from ``input_ids`` where not given.
            past_key_values: A cache to read and extend.
            inputs_embeds: Embeddings instead of ids; no visual tokens are put into them.
            labels: Targets, -100 where there is none: the mean loss comes with the logits.
            use_cache: Return a cache; by default in evaluation, if the text config says so.
            logits_to_keep: How many last tokens to compute logits of, 0 for all, or their index.
            increments: Position step of visual tokens, one for all or one an image, row after
                row; the configuration's where not given.
            features: What `encode_images` made before, instead of ``pixel_values``.
            tokens_per_tile: Visual tokens of each tile, for which ``input_ids`` have places; all
                tiles are full where not given. The router is not asked here, but in `generate`.
            return_dict: Accepted for transformers' sake; the output is always a named one.
            batch: Packed rows; with it, only ``head_fn`` and ``features`` are read.
            head_fn: From the logits of a chunk of targets, and its place among them, to one
                number a target.

        Raises:
            ValueError: If image-context tokens and visual tokens differ in number.
            RequestError: If the arguments contradict each other.
        """
        if batch is not None:
            if head_fn is None:
                raise ValueError("forward(batch=...) needs head_fn, the function of the logits")
            return self._score(batch, head_fn, features)
        visual = (pixel_values, features, tokens_per_tile)
        inputs_embeds = self._embedded(input_ids, inputs_embeds, visual, past_key_values)
        if use_cache is None:
            use_cache = not self.training and bool(self.config.text_config.use_cache)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        if position_ids is None:
            position_ids = self._positions(
                input_ids, inputs_embeds, attention_mask, past_key_values, increments
            )
        output = self.decode(
            inputs_embeds,
            position_ids.to(torch.float32).expand(inputs_embeds.shape[:2]),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
        )
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            output.loss = self.loss_function(output.logits, labels, vocab_size=vocab_size)
        return output

    def _score(
        self, batch: Batch, head_fn: HeadFn, features: VisualFeatures | None
    ) -> Float[Tensor, " targets"]:
        """Packed rows to one number a target: encode, scatter, run the text body, score."""
        num_visual = int(batch.tokens_per_tile.sum())
        if num_visual != len(batch.visual_index):
            raise ValueError(
                f"the batch announces {num_visual} visual tokens for {batch.num_tiles} tiles but "
                f"has places for {len(batch.visual_index)}"
            )
        visual = None
        if features is not None:
            visual = self.model.visual_tokens(features, batch.tokens_per_tile)
        elif batch.tiles is not None:
            visual = self.model.encode(batch.tiles, batch.tokens_per_tile)
        embeds = self.model.embed(batch.input_ids, batch.visual_index, visual)
        if self.model.looks_along is not None:
            looked = visual is not None and features is None
            embeds = self.model.keep_company(embeds, has_looked=looked)
        layout = self.model.layout(batch.segments, batch.parents)
        hidden_states = self.model.run_text(embeds, batch.position_ids, layout)
        scores = score_targets(
            hidden_states,
            batch.target_index,
            self.lm_head,
            head_fn,
            self.config.text_config.vocab_size,
        )
        return scores if self.model.looks_along is None else scores.clone()  # a view loses hooks

    def _embedded(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        visual: tuple[Tensor | None, VisualFeatures | None, Sequence[int] | Tensor | None],
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Embeddings of a request, its visual tokens in their places."""
        pixel_values, features, tokens_per_tile = visual
        if (input_ids is None) == (inputs_embeds is None):
            raise RequestError("give exactly one of input_ids and inputs_embeds")
        if pixel_values is not None and features is not None:
            raise RequestError("give either pixel_values or features, not both")
        if inputs_embeds is not None:
            if pixel_values is not None or features is not None:
                raise RequestError("images need input_ids, which say where their tokens stand")
            return inputs_embeds
        assert input_ids is not None
        if pixel_values is not None:
            features = self.encode_images(pixel_values)
        place = (input_ids == self.config.image_token_id).flatten().nonzero().squeeze(1)
        if features is None and past_key_values is not None and not is_empty(past_key_values):
            place = place[:0]  # the model itself wrote an image-context token: it is text
        tokens = None if features is None else self.model.visual_tokens(features, tokens_per_tile)
        embeds: Tensor = self.model.embed(input_ids, place, tokens)
        return embeds

    def _positions(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        increments: float | Sequence[float] | None,
    ) -> Tensor:
        """Positions of a request that brought none."""
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        rows, width = inputs_embeds.shape[:2]
        if past == 0 and input_ids is not None:
            steps = resolve_increments(self.config, input_ids, attention_mask, 0, increments)
            return self.prompt_positions(input_ids, attention_mask, steps)
        if self.config.increment != 1 or increments not in (None, 1, 1.0):
            raise RequestError(
                f"position_ids are needed after {past} cached tokens, because the increment is "
                f"{increments or self.config.increment}: continue each row's last position by 1"
            )
        if attention_mask is None:
            attention_mask = inputs_embeds.new_ones(rows, past + width, dtype=torch.int64)
        return (attention_mask.cumsum(1)[:, past:] - 1).clamp(min=0).float()

    def prompt_positions(
        self,
        input_ids: Int[Tensor, "rows tokens"],
        attention_mask: Int[Tensor, "rows tokens"] | Bool[Tensor, "rows tokens"] | None,
        increments: float | Sequence[float],
    ) -> Float[Tensor, "rows tokens"]:
        """Positions of padded prompts under this model's configuration."""
        return prompt_positions(
            input_ids,
            attention_mask,
            image_token_id=self.config.image_token_id,
            increments=increments,
            ceil_after_image=self.config.ceil_after_image,
        )

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        """Leave the 2D mask to `decode`, which knows what fractional positions mean.

        transformers' `generate` calls this for preallocated caches.
        """
        return attention_mask

    def generate(  # type: ignore[override]  # the rest of its arguments pass through kwargs
        self,
        inputs: Int64[Tensor, "rows tokens"] | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        increments: float | Sequence[float] | None = None,
        visual_budget: VisualBudget | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does, from float positions.

        Prompts of different lengths are padded on the left, as transformers wants it. The
        positions are worked out here once; transformers then carries each row's own on by 1 a
        token. Prompts have places for full tiles; those that the router leaves empty are taken
        out, row by row, and what is returned begins with the prompts as they came.

        Args:
            inputs: Token ids, also as ``input_ids``.
            generation_config: As in transformers.
            increments: Position step of visual tokens, one for all or one an image; the
                configuration's where not given. Give the same for a continued conversation.
            visual_budget: Which tiles of a row are compressed; the configuration's thresholds
                where not given.
            kwargs: As in transformers.

        Raises:
            RequestError: If prompt and new tokens do not fit the trained context, or a budget is
                given to a model without a router.
        """
        budget = budget_for(self.config, visual_budget)
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is not None and kwargs.get("position_ids") is None:
            config = generation_config or self.generation_config
            mask = kwargs.get("attention_mask")
            if mask is None:
                mask = kwargs["attention_mask"] = inferred_mask(input_ids, config, kwargs)
            new = kwargs.get("max_new_tokens") or config.max_new_tokens
            if new is None:
                longest = kwargs.get("max_length") or config.max_length or 20
                new = max(longest - input_ids.shape[1], 0)
            if budget != "full" and kwargs.get("pixel_values") is not None:
                if config.max_new_tokens is None:
                    kwargs["max_new_tokens"] = new
                how = (new, increments, budget)
                return self._generate_routed(input_ids, generation_config, how, **kwargs)
            steps = resolve_increments(self.config, input_ids, mask, new, increments)
            kwargs["position_ids"] = self.prompt_positions(input_ids, mask, steps)
        return super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]

    def _generate_routed(
        self,
        prompts: Int64[Tensor, "rows tokens"],
        generation_config: GenerationConfig | None,
        how: tuple[int, float | Sequence[float] | None, VisualBudget],
        *,
        pixel_values: Tensor,
        attention_mask: Tensor,
        **kwargs: Any,
    ) -> Any:
        """Let the router decide, row by row, and generate from what is left of the prompts."""
        num_new, increments, budget = how
        with torch.no_grad():
            features = self.encode_images(pixel_values)
            assert features.compress is not None, "a budget needs a router"
            counts = routes_of_rows(self.config, prompts, features.compress, budget)
            ids, mask = shortened(self.config, prompts, attention_mask, counts)
            kwargs["inputs_embeds"] = self._embedded(ids, None, (None, features, counts))
        steps = resolve_increments(self.config, ids, mask, num_new, increments)
        kwargs["position_ids"] = self.prompt_positions(ids, mask, steps)
        kwargs.pop("input_ids", None)
        made = super().generate(ids, generation_config, attention_mask=mask, **kwargs)  # type: ignore[misc]
        return with_prompts(made, prompts, ids.shape[1])

    def encode_images(self, pixel_values: Float[Tensor, "tiles 3 px px"]) -> VisualFeatures:
        """The vision half: normalised tiles to visual tokens; with a router, to what it routes."""
        patches = self.model.patch_features(pixel_values)
        if self.model.router is None:
            return VisualFeatures(projected=self.model.multi_modal_projector(patches))
        return VisualFeatures(patches=patches, compress=self.model.router(patches))

    def decode(
        self,
        inputs_embeds: Float[Tensor, "rows tokens hidden"],
        position_ids: Float[Tensor, "rows tokens"],
        *,
        attention_mask: Int[Tensor, "rows keys"] | Bool[Tensor, "rows keys"] | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> InternVLCausalLMOutputWithPast:
        """The language half: embeddings to logits.

        Args:
            inputs_embeds: Embeddings of the new tokens, visual tokens in their places.
            position_ids: Float positions of the new tokens.
            attention_mask: Nonzero where a key is real, those in the cache first.
            past_key_values: A cache to read and extend.
            logits_to_keep: How many last tokens to compute logits of, 0 for all, or their index.
        """
        rows, width = inputs_embeds.shape[:2]
        if past_key_values is None or is_empty(past_key_values):
            segments = row_segments(rows, width, attention_mask, inputs_embeds.device)
            layout = self.model.layout(segments, torch.full_like(segments, NO_PARENT))
            hidden_states = self.model.run_text(
                inputs_embeds, position_ids, layout, past_key_values
            )
        else:
            num_keys = int(past_key_values.get_seq_length()) + width
            mask = inputs_embeds.new_ones(rows, num_keys, dtype=torch.bool)
            if attention_mask is not None:
                mask = attention_mask.bool()
            hidden_states = self.model.run_cached(
                inputs_embeds, position_ids, mask, past_key_values
            )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept])
        return InternVLCausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
