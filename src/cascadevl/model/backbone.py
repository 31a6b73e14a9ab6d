"""The two bodies and what stands between them: everything but the language head.

Between them are the projector and, in a Flash model, a second one for compressed tiles and the
router that chooses them. The bodies are transformers' own, built with our attention functions;
the parameters have the names that transformers' `InternVLModel` gives them, where it has some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64, UInt8
from torch import Tensor, nn
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.models.internvl.modeling_internvl import InternVLPreTrainedModel

from cascadevl.data.tiling import normalise
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
from cascadevl.model.projector import CompressedProjector, Projector
from cascadevl.model.router import Router
from cascadevl.model.v2pe import check_dynamic, dynamic_limit
from cascadevl.types import VisualFeatures


class CascadeVLModel(InternVLPreTrainedModel):
    """Vision tower, projectors, router and text body, without the language head."""

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
        self.compressed_projector = CompressedProjector(config) if config.flash_mode else None
        self.router = Router(config) if config.flash_mode else None
        self.language_model = AutoModel.from_config(
            config.text_config, attn_implementation=TEXT_ATTENTION
        )
        use_lean_norms(self)
        self.drop_path = DropPath(self.vision_tower.encoder.layer, float(config.drop_path_rate))
        # Of a model that processes share: whether any of them has tiles in the call at hand.
        self.looks_along: bool | None = None
        self.post_init()  # type: ignore[no-untyped-call]

    def patch_features(
        self, pixel_values: Float[Tensor, "tiles 3 px px"]
    ) -> Float[Tensor, "tiles patches channels"]:
        """What the vision tower makes of normalised tiles, without the class token."""
        patches = self.vision_tower(pixel_values=pixel_values.to(self.dtype)).last_hidden_state
        features: Tensor = patches[:, 1:]
        return features

    def project(
        self,
        patches: Float[Tensor, "tiles patches channels"],
        tokens_per_tile: Int64[Tensor, " tiles"] | None = None,
    ) -> Float[Tensor, "visual hidden"]:
        """Visual tokens of tiles, one tile behind the other; each by the projector it needs only.

        Args:
            patches: Patch features, without the class token.
            tokens_per_tile: Visual tokens of each tile; all are full where not given.

        Raises:
            ValueError: If a tile is to have a number of tokens that no projector makes.
        """
        projectors = self._projectors()
        used = {self.config.tokens_per_tile}
        if tokens_per_tile is not None:
            used = {int(number) for number in tokens_per_tile.unique()} or used
        if used - projectors.keys():
            raise ValueError(
                f"tiles are to have {sorted(used)} visual tokens, but this model makes "
                f"{' or '.join(map(str, projectors))}; were the tiles counted for another model?"
            )
        if tokens_per_tile is None or len(used) == 1:
            whole: Tensor = projectors[used.pop()](patches)
            return whole.flatten(0, 1)
        starts = tokens_per_tile.cumsum(0) - tokens_per_tile
        made: list[Tensor] = []
        places: list[Tensor] = []
        for number in sorted(used):
            chosen = tokens_per_tile == number
            made.append(projectors[number](patches[chosen]).flatten(0, 1))
            within = torch.arange(number, device=starts.device)
            places.append((starts[chosen, None] + within).flatten())
        visual = torch.cat(made)
        return torch.empty_like(visual).index_copy(0, torch.cat(places), visual)

    def visual_tokens(
        self,
        features: VisualFeatures,
        tokens_per_tile: Sequence[int] | Int64[Tensor, " tiles"] | None = None,
    ) -> Float[Tensor, "visual hidden"]:
        """Visual tokens of tiles that were encoded before, one tile behind the other.

        Args:
            features: What is known of the tiles.
            tokens_per_tile: Visual tokens of each tile; all are full where not given.

        Raises:
            ValueError: If there are not as many numbers as tiles, or the features are visual tokens
                already, and others than asked for.
        """
        counts = tokens_per_tile
        if counts is not None and not isinstance(counts, Tensor):
            counts = torch.tensor(counts, dtype=torch.int64, device=self.device)
        if counts is not None and len(counts) != features.num_tiles:
            raise ValueError(
                f"{len(counts)} numbers of visual tokens for {features.num_tiles} tiles"
            )
        if features.patches is not None:
            return self.project(features.patches, counts)
        assert features.projected is not None, "features hold one of the two"
        made = features.projected.shape[1]
        if counts is not None and bool((counts != made).any()):
            raise ValueError(
                f"tiles are to have {sorted(set(counts.tolist()))} visual tokens, but came with "
                f"{made}; give their patch features"
            )
        return features.projected.flatten(0, 1)

    def _projectors(self) -> dict[int, nn.Module]:
        """The projector that makes each number of visual tokens."""
        found: dict[int, nn.Module] = {self.config.tokens_per_tile: self.multi_modal_projector}
        if self.compressed_projector is not None:
            found[self.config.compressed_tokens] = self.compressed_projector
        return found

    def encode(
        self,
        tiles: UInt8[Tensor, "tiles px px 3"],
        tokens_per_tile: Int64[Tensor, " tiles"] | None = None,
    ) -> Float[Tensor, "visual hidden"]:
        """Visual tokens of the tiles of a batch, one tile behind the other.

        Args:
            tiles: RGB tiles, which are normalised here; `patch_features` takes normalised ones.
            tokens_per_tile: Visual tokens of each tile; all are full where not given.
        """
        return self.project(self.patch_features(normalise(tiles)), tokens_per_tile)

    def embed(
        self,
        input_ids: Int[Tensor, "rows tokens"],
        visual_index: Int64[Tensor, " visual"],
        visual: Float[Tensor, "*made hidden"] | None,
    ) -> Float[Tensor, "rows tokens hidden"]:
        """Token embeddings with the visual tokens in their places.

        Raises:
            ValueError: If there are not as many places as visual tokens.
        """
        embeds: Tensor = self.language_model.get_input_embeddings()(input_ids)
        flat = embeds.new_empty(0, embeds.shape[-1]) if visual is None else visual.flatten(0, -2)
        if len(visual_index) != len(flat):
            raise ValueError(
                f"{len(visual_index)} image-context tokens in the text but {len(flat)} visual "
                f"tokens are given; was the text expanded for another tiling or another number of "
                f"tokens a tile?"
            )
        if visual is None:
            return embeds
        return embeds.flatten(0, 1).index_copy(0, visual_index, flat.to(embeds)).view_as(embeds)

    def keep_company(
        self, embeds: Float[Tensor, "rows tokens hidden"], *, has_looked: bool
    ) -> Float[Tensor, "rows tokens hidden"]:
        """The same embeddings, made with all weights that other processes use in this call.

        Processes that share a model put its weights together, and add up their gradients, in step:
        the vision tower's if any of them has tiles, and both projectors' whatever a tile needs.

        Args:
            embeds: Embeddings of the rows, visual tokens in their places.
            has_looked: Whether this process has encoded tiles.
        """
        assert self.looks_along is not None, "nobody shares this model"
        used = [p for each in self._projectors().values() for p in each.parameters()]
        nothing = torch.stack([p.sum() for p in used if p.requires_grad] or [embeds.new_zeros(())])
        along = nothing.sum() * 0
        if self.looks_along and not has_looked:
            px = self.config.tile_px
            tile = torch.zeros(1, px, px, 3, dtype=torch.uint8, device=embeds.device)
            along = along + self.patch_features(normalise(tile)).sum() * 0
        return embeds + along.to(embeds.dtype)

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
