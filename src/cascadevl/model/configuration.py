"""The configuration: transformers' InternVL configuration and what plain transformers ignores.

``model_type`` stays ``internvl``, so a checkpoint of ours opens in plain transformers, which keeps
the extra keys as attributes and does not use them. Where they change what the model computes,
`CascadeVLConfig.plain_transformers_obstacle` says so.
"""

# No `from __future__ import annotations`: `strict` reads the fields' types when a value is set.
from typing import Any, get_args, no_type_check

from huggingface_hub.dataclasses import strict
from transformers import InternVLConfig

from cascadevl.errors import ConfigError
from cascadevl.sequence import INCREMENTS
from cascadevl.types import ProcessPrompt

FLASH_OBSTACLE = "a router compresses tiles; transformers has none and keeps all visual tokens"
"""Why plain transformers would compute something else with a Flash checkpoint."""


@no_type_check  # the keys are checked by `strict`, and unknown ones must be let through
@strict
class CascadeVLConfig(InternVLConfig):
    """Configuration of `cascadevl.model.modeling.CascadeVLForConditionalGeneration`.

    Attributes:
        vision_config: Configuration of the vision tower.
        text_config: Configuration of the text body.
        ps_version: Order of the tokens after pixel shuffle: ``"v2"`` as all released models of
            this family, ``"v1"`` transposed, as the class default of the public code.
        increment: Position step of a visual token (V2PE): a number, 1.0 in released weights, or
            ``"auto"``, the largest of 1, 1/2, ..., 1/256 with which the request fits.
        trained_context: Positions the model was trained for; None where it is not known.
        ceil_after_image: Round the position up after an image (the public V2PE code).
        template: Name of the conversation template.
        system_message: System message instead of the template's; "" for none.
        min_tiles: Fewest tiles of an image, the thumbnail not counted.
        max_tiles: Most tiles of an image, the thumbnail not counted.
        use_thumbnail: Add a small picture of the whole image where there are several tiles.
        process_prompt: What a process reward model was trained to read around question and steps:
            ``"released"``, VisualPRM's page, or ``"short"``; means nothing to other models.
        drop_path_rate: Probability to drop the last residual branch of the vision tower in
            training, rising linearly from 0 at the first layer.
        flash_mode: Whether there are a second projector, for compressed tiles, and a router that
            chooses them (InternVL3.5-Flash).
        flash_absolute_threshold: Tiles that the router gives a smaller probability than this are
            never compressed; None where it was not calibrated, and no tile is unless asked for.
        flash_relative_threshold: Share of the tiles of a request, the least probable ones, that are
            never compressed, as in released weights; None for no such rule.
        flash_downsample_ratio: New side over old side of a compressed tile's grid of patches.
        flash_layers: ``"all"`` four attention layers of the router; or ``"released"``: the first
            once and the second three times, as released weights are used (docs/decisions/0025).
        flash_heads: Heads of these layers.
    """

    vision_config: Any = None
    text_config: Any = None
    ps_version: str = "v2"
    increment: float | int | str = 1.0
    trained_context: int | None = None
    ceil_after_image: bool = False
    template: str = "internvl2_5"
    system_message: str | None = None
    min_tiles: int = 1
    max_tiles: int = 12
    use_thumbnail: bool = True
    process_prompt: str = "released"
    drop_path_rate: float | int = 0.0
    flash_mode: bool = False
    flash_absolute_threshold: float | int | None = None
    flash_relative_threshold: float | int | None = None
    flash_downsample_ratio: float = 0.25
    flash_layers: str = "all"
    flash_heads: int = 16

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the two halves' configurations and check our own keys.

        Raises:
            ConfigError: If a key of ours has a value that means nothing.
        """
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        if self.ps_version not in ("v1", "v2"):
            raise ConfigError(f"ps_version is {self.ps_version!r}; it must be 'v1' or 'v2'")
        if isinstance(self.increment, str) and self.increment != "auto":
            raise ConfigError(f"increment is {self.increment!r}; give a number in (0, 1] or 'auto'")
        if not isinstance(self.increment, str) and not 0 < self.increment <= 1:
            raise ConfigError(f"increment is {self.increment}; it must lie in (0, 1] or be 'auto'")
        if self.increment == "auto" and self.trained_context is None:
            raise ConfigError("increment 'auto' needs trained_context, the positions to fit into")
        if self.process_prompt not in get_args(ProcessPrompt):
            raise ConfigError(
                f"process_prompt is {self.process_prompt!r}; use "
                f"{' or '.join(get_args(ProcessPrompt))}"
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ConfigError(f"drop_path_rate is {self.drop_path_rate}; it must lie in [0, 1)")
        if self.vision_feature_layer != -1 or self.vision_feature_select_strategy != "default":
            raise ConfigError(
                f"vision_feature_layer {self.vision_feature_layer} with strategy "
                f"{self.vision_feature_select_strategy!r} is not supported; every released model "
                f"uses the last layer (-1) without the class token ('default')"
            )
        if self.flash_mode:
            self.check_flash()

    def check_flash(self) -> None:
        """Check what compressed tiles and their router need.

        Raises:
            ConfigError: If a key has a value that means nothing, or the shapes do not allow it.
        """
        if self.flash_layers not in ("all", "released"):
            raise ConfigError(f"flash_layers is {self.flash_layers!r}; use 'all' or 'released'")
        width = self.vision_config.hidden_size
        if width % self.flash_heads:
            raise ConfigError(
                f"flash_heads is {self.flash_heads}, which does not divide the vision tower's "
                f"width of {width}"
            )
        relative, absolute = self.flash_relative_threshold, self.flash_absolute_threshold
        if relative is not None and (absolute is None or not 0 <= relative <= 1):
            raise ConfigError(
                f"flash_relative_threshold is {relative}, a share, 0 to 1, and needs "
                f"flash_absolute_threshold beside it, which is {absolute}"
            )
        side, factor = self._side_patches, round(1 / self.flash_downsample_ratio)
        if side % factor or self.compressed_tokens >= self.tokens_per_tile:
            raise ConfigError(
                f"flash_downsample_ratio is {self.flash_downsample_ratio}; a tile of {side} x "
                f"{side} patches needs one that makes whole tokens, and fewer than "
                f"{self.tokens_per_tile}"
            )

    @property
    def _side_patches(self) -> int:
        """Patches along a side of a tile."""
        return self.tile_px // int(self.vision_config.patch_size[0])

    @property
    def patches_per_tile(self) -> int:
        """Patches of one tile; the vision tower adds a class token."""
        return self._side_patches**2

    @property
    def tile_px(self) -> int:
        """Side of a tile in pixels."""
        return int(self.vision_config.image_size[0])

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile at full resolution."""
        return int(self._side_patches * self.downsample_ratio) ** 2

    @property
    def compressed_tokens(self) -> int:
        """Visual tokens of a compressed tile."""
        return int(self._side_patches * self.flash_downsample_ratio) ** 2

    @property
    def plain_transformers_obstacle(self) -> str | None:
        """Why plain transformers would compute something else, or None if it would not."""
        if self.ps_version != "v2":
            return f"pixel shuffle {self.ps_version}; transformers always uses v2"
        if self.increment != INCREMENTS[0]:
            return f"visual tokens step by {self.increment}; transformers always steps by 1"
        return FLASH_OBSTACLE if self.flash_mode else None


def attention_windows(text_config: Any) -> tuple[int | None, ...]:
    """The sliding windows a text body's layers use, in tokens; None is full attention."""
    window = getattr(text_config, "sliding_window", None)
    kinds = getattr(text_config, "layer_types", None)
    if kinds is None:
        return (window,)
    return tuple({None if kind == "full_attention" else window: 0 for kind in kinds})
