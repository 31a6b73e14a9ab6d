"""The two bodies and the projector between them: everything but the language head.

The bodies are transformers' own, built with our attention functions; the parameters have the names
that transformers' `InternVLModel` gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.models.internvl.modeling_internvl import InternVLPreTrainedModel

from cascadevl.model.attention import (
    TEXT_ATTENTION,
    VISION_ATTENTION,
    Attend,
    register_attention,
)
from cascadevl.model.configuration import CascadeVLConfig, attention_windows
from cascadevl.model.drop_path import DropPath
from cascadevl.model.layout import PackedLayout, packed_layout
from cascadevl.model.masks import cached_masks
from cascadevl.model.norm import use_lean_norms
from cascadevl.model.projector import Projector
from cascadevl.model.v2pe import check_dynamic, dynamic_limit


class CascadeVLModel(InternVLPreTrainedModel):
    """Vision tower, projector and text body, without the language head."""

    config: CascadeVLConfig
    config_class = CascadeVLConfig

    def __init__(self, config: CascadeVLConfig) -> None:
        """Build the parts with our attention functions."""
        register_attention()
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(
            config.vision_config, attn_implementation=VISION_ATTENTION
        )
        self.multi_modal_projector = Projector(config)
        self.language_model = AutoModel.from_config(
            config.text_config, attn_implementation=TEXT_ATTENTION
        )
        use_lean_norms(self)
        self.drop_path = DropPath(self.vision_tower.encoder.layer, float(config.drop_path_rate))
        self.post_init()  # type: ignore[no-untyped-call]

    def encode(self, pixel_values: Float[Tensor, "tiles 3 px px"]) -> Tensor:
        """Visual tokens of tiles: (tiles, visual tokens, hidden)."""
        patches = self.vision_tower(pixel_values=pixel_values.to(self.dtype)).last_hidden_state
        visual: Tensor = self.multi_modal_projector(patches[:, 1:])  # without the class token
        return visual

    def embed(
        self,
        input_ids: Int[Tensor, "rows tokens"],
        visual_index: Int64[Tensor, " visual"],
        visual: Float[Tensor, "tiles visual_tokens hidden"] | None,
    ) -> Float[Tensor, "rows tokens hidden"]:
        """Token embeddings with the visual tokens in their places.

        Raises:
            ValueError: If there are not as many places as visual tokens.
        """
        embeds: Tensor = self.language_model.get_input_embeddings()(input_ids)
        num_visual = 0 if visual is None else visual.shape[0] * visual.shape[1]
        if len(visual_index) != num_visual:
            raise ValueError(
                f"{len(visual_index)} image-context tokens in the text but {num_visual} visual "
                f"tokens from {0 if visual is None else len(visual)} tiles given; was the text "
                f"expanded for another tiling or another number of tokens a tile?"
            )
        if visual is None:
            return embeds
        flat = embeds.flatten(0, 1).index_copy(0, visual_index, visual.flatten(0, 1).to(embeds))
        return flat.view_as(embeds)

    def layout(
        self, segments: Int[Tensor, "rows tokens"], parents: Int[Tensor, "rows tokens"]
    ) -> PackedLayout:
        """Who sees whom, for every window of the text body."""
        windows = attention_windows(self.language_model.config)
        return packed_layout(segments, parents, windows=windows)

    def run_text(
        self,
        inputs_embeds: Float[Tensor, "rows tokens hidden"],
        position_ids: Float[Tensor, "rows tokens"],
        layout: PackedLayout,
        past_key_values: Cache | None = None,
    ) -> Float[Tensor, "rows tokens hidden"]:
        """Hidden states of packed rows; a cache to fill, if any, must be empty."""
        return self._body(inputs_embeds, position_ids, past_key_values, packed_layout=layout)

    def run_attending(
        self,
        inputs_embeds: Float[Tensor, "rows tokens hidden"],
        position_ids: Float[Tensor, "rows tokens"],
        attend: Attend,
    ) -> Float[Tensor, "rows tokens hidden"]:
        """Hidden states of tokens whose attention, and keys and values, the caller sees to."""
        return self._body(inputs_embeds, position_ids, None, attend=attend)

    def run_cached(
        self,
        inputs_embeds: Float[Tensor, "rows tokens hidden"],
        position_ids: Float[Tensor, "rows tokens"],
        attention_mask: Bool[Tensor, "rows keys"],
        past_key_values: Cache,
    ) -> Float[Tensor, "rows tokens hidden"]:
        """Hidden states of tokens that follow those in a cache, which they extend."""
        masks = cached_masks(
            attention_mask, inputs_embeds.shape[1], past_key_values, self.language_model.config
        )
        return self._body(inputs_embeds, position_ids, past_key_values, attention_mask=masks)

    def _body(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        past_key_values: Cache | None,
        **who_sees_whom: Any,
    ) -> Tensor:
        if position_ids.dtype != torch.float32:
            raise ValueError(
                f"position_ids are {position_ids.dtype}; they must be float32, because bfloat16 "
                f"merges neighbours beyond 256"
            )
        if dynamic_limit(self.config) is not None:
            check_dynamic(self.config, float(position_ids.max()) + 1)
        hidden_states: Tensor = self.language_model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            **who_sees_whom,
        ).last_hidden_state
        return hidden_states

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CascadeVLModel:
        """Move or cast, but keep the rotary frequencies in float32.

        ``model.to(torch.bfloat16)`` would round them, and every position with them.
        """
        rotary = [m for m in self.language_model.modules() if "inv_freq" in m._buffers]
        names = ("inv_freq", "original_inv_freq")
        before = [{name: m._buffers.get(name) for name in names} for m in rotary]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, buffers in zip(rotary, before, strict=True):
            for name, exact in buffers.items():
                moved = module._buffers.get(name)
                if exact is not None and moved is not None and moved.dtype != exact.dtype:
                    module._buffers[name] = exact.to(moved.device)
        return self
