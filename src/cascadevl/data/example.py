"""From a record to the tokens and tiles of one example, for training and for inference alike.

Both go through `ExampleBuilder`, so that a model is asked in exactly the form it was trained on:
one rendering, one tiling (docs/architecture). Whatever is drawn at random (JPEG quality, frames,
increments, compression) is a function of (seed, data set, record id, epoch) alone, so that a
record can be made again at any time, in any process, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from cascadevl.data.branches import BranchWriter
from cascadevl.data.conversation import (
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    End,
    Piece,
    check_text,
    control_pattern,
    render,
    system_text,
    template_named,
)
from cascadevl.data.encoding import TextEncoder
from cascadevl.data.pictures import Draw, Pictures
from cascadevl.data.tiling import TilingConfig, limit_for
from cascadevl.errors import ConfigError, DataError
from cascadevl.sequence import num_positions
from cascadevl.types import NO_PARENT, Example, ImageRef, Message, Record


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleConfig:
    """How records become examples.

    Attributes:
        template: Conversation template, a key of `cascadevl.data.conversation.TEMPLATES`.
        system: System message of conversations that have none; None for the template's own,
            empty for no system turn.
        tiling: How pictures are cut into tiles; a data set's own ``max_dynamic_patch`` goes first.
        max_tokens: Most tokens of an example, visual tokens and all branches included (released
            SFT: 16384 for InternVL3, 32768 for InternVL3.5).
        jpeg: Degrade the pictures of every data set by random JPEG compression, not only of those
            whose meta file says ``data_augment``. Never video frames.
        increment: Position step of visual tokens (V2PE), or ``"random"`` for one of 1, 1/2, ...,
            1/256 an image or video, as in InternVL3's pre-training (report, eq. 4). Released
            weights: 1.
        max_positions: Most positions of an example; None for no limit.
        seed: Start of all random draws.
        min_frames: Fewest frames drawn from a video in training (released: 8).
        max_frames: Most frames drawn from a video in training, and the number at inference.
        share_tiles: Whether several pictures of one sample share ``max_tiles``, as in released
            training; False gives each of them all, as released -HF processors do.
        compress: Probability that all tiles of an image, or all frames of a video, are compressed
            (ViCO, InternVL3.5 report: 0.5 each for 1/4 and 1/16 of the patch features).
        mixed: Probability that they are compressed each by itself instead, any share of them, as
            a router leaves them (docs/decisions/0053; the report: never).
        one_form: Draw everything but the compression as in the first epoch, so that what another
            model thought of a record once holds in every epoch.
    """

    template: str = "internvl2_5"
    system: str | None = None
    tiling: TilingConfig = field(default_factory=TilingConfig)
    max_tokens: int = 16384
    jpeg: bool = False
    increment: float | Literal["random"] = 1.0
    max_positions: int | None = None
    seed: int = 0
    min_frames: int = 8
    max_frames: int = 32
    share_tiles: bool = True
    compress: float = 0.0
    mixed: float = 0.0
    one_form: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: If the template is unknown or a number is out of range.
        """
        template_named(self.template)
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}, but must be at least 1")
        if not 1 <= self.min_frames <= self.max_frames:
            raise ConfigError(
                f"min_frames is {self.min_frames} and max_frames {self.max_frames}, "
                "but 1 <= min_frames <= max_frames must hold"
            )
        if self.increment != "random" and not 0.0 < self.increment <= 1.0:
            raise ConfigError(
                f"increment is {self.increment}, but must be above 0 and at most 1, or 'random'"
            )
        for name in ("compress", "mixed"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is a probability, 0 to 1")


@dataclass(slots=True)
class _Encoded:
    """Tokens of a stretch, growing."""

    ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)

    def add(self, ids: Sequence[int], trained: bool) -> None:
        self.ids += ids
        self.trained += [trained] * len(ids)


class ExampleBuilder:
    """Makes examples from records, and from conversations that wait for an answer.

    Several branches of a record share its messages: segment 0 holds what they have in common,
    each branch is a segment that continues it (`cascadevl.data.branches`). The tokens of segment 0
    and of a branch together are, one by one, those of the same conversation alone.

    A ``pretrain`` document ends with the tokenizer's end-of-sequence token, which is trained, so
    that a model stops where a text does; released code is silent about it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: ExampleConfig,
        tokens_per_tile: int,
        *,
        compressed_tokens: int | None = None,
    ) -> None:
        """Bind tokenizer and configuration.

        Args:
            tokenizer: Knows the image tokens and the template's control tokens.
            config: How records become examples.
            tokens_per_tile: Visual tokens of a full tile, also for the limit on length: a sample
                that is compressed must fit uncompressed too.
            compressed_tokens: Visual tokens of a compressed tile; needed where some are drawn.

        Raises:
            ConfigError: If the tokenizer lacks a token that is needed, or tiles are to be
                compressed without a word on how far.
        """
        self.tokenizer, self.config, self.tokens_per_tile = tokenizer, config, tokens_per_tile
        if (config.compress or config.mixed) and compressed_tokens is None:
            raise ConfigError(
                f"compress is {config.compress} and mixed {config.mixed}, but the model has no "
                f"compressed tiles; start from one with flash_mode"
            )
        self.compressed_tokens = compressed_tokens
        self.template = template_named(config.template)
        text_end = tokenizer.eos_token or self.template.last_answer_end
        self._writer = BranchWriter(self.template, text_end)
        self._encoder = TextEncoder(tokenizer)
        self.stop_token_ids = tuple(map(self._encoder.id_of, self.template.stop_tokens))
        tokens = (IMAGE_START, IMAGE_CONTEXT, IMAGE_END)
        self._image_ids = tuple(map(self._encoder.id_of, tokens))
        self.image_token_id = self._image_ids[1]
        added = tokenizer.added_tokens_decoder.values()
        self.control = control_pattern(
            self.template, [token.content for token in added if token.special]
        )

    def __call__(self, record: Record, *, epoch: int = 0) -> Example:
        """Make the training example of a record.

        Args:
            record: The record.
            epoch: How often its data set was seen before; changes what is drawn at random.

        Raises:
            DataError: If the record cannot be used; names its place. Among the kinds are
                ``too_long``, ``no_target``, ``control_token``, ``roles`` and ``image_count``.
        """
        try:
            example = self._build(record, epoch)
        except DataError as error:
            raise error.at(record.source) from error
        trained = set(example.segments[example.trained].tolist())
        first = len(example.parents) - max(1, len(record.branches))
        for number in range(first, len(example.parents)):
            if number not in trained:
                place = f"branch {number - first + 1}" if record.branches else "the sample"
                raise DataError(
                    f"nothing in {place} is trained: it has no assistant turn and no document",
                    kind="no_target",
                    source=record.source,
                    field="conversations",
                    remedy="end it with an answer",
                )
        return example

    def prompt(
        self,
        messages: Sequence[Message],
        *,
        system: str | None = None,
        thinking: bool | None = None,
        force_thinking: bool = False,
        end: End = "prompt",
        max_tiles: int | None = None,
        source: str = "prompt",
    ) -> Example:
        """Make the example that a model is to answer: nothing trained, nothing random.

        Args:
            messages: The conversation so far.
            system: Instead of the configured system message; empty for no system turn.
            thinking: True asks for reasoning through the system message.
            force_thinking: Also begin the answer so that the mode is certain.
            end: How the text ends; an answer follows the header of its turn.
            max_tiles: Limit of the record these turns come from, if it has its own.
            source: Named in errors.

        Raises:
            DataError: If the conversation cannot be used.
        """
        try:
            pictures = self._pictures([messages], max_tiles, source, None, augment=False)
            shown = self._shown(messages, pictures)
            pieces = render(
                shown,
                self.template,
                system=self.config.system if system is None else system,
                thinking=thinking,
                force_thinking=force_thinking,
                end=end,
            )
            example = self._example([pieces], (NO_PARENT,), pictures, record_id=source)
        except DataError as error:
            raise error.at(source) from error
        return replace(example, trained=np.zeros_like(example.trained))

    def _build(self, record: Record, epoch: int) -> Example:
        conversations = [[*record.messages, *branch] for branch in record.branches]
        draw = Draw(self.config.seed, (record.dataset, record.record_id, epoch))
        pictures = self._pictures(
            conversations or [record.messages],
            record.max_tiles,
            record.source,
            draw.in_epoch(0) if self.config.one_form else draw,
            augment=record.augment or self.config.jpeg,
        )
        shared = self._shown(record.messages, pictures)
        branches = [self._shown(branch, pictures) for branch in record.branches]
        every_turn = [*shared, *(turn for branch in branches for turn in branch)]
        system = system_text(every_turn, self.template, system=self.config.system)
        segments = self._writer.segments(shared, branches, system=system)
        if branches and not segments[0]:  # nothing in common: every branch starts anew
            segments, parents = segments[1:], (NO_PARENT,) * len(branches)
        else:
            parents = (NO_PARENT, *(0 for _ in branches))
        example = self._example(segments, parents, pictures, record_id=record.record_id)
        return replace(example, tokens_per_tile=self._counts(pictures, draw))

    def _pictures(
        self,
        conversations: Sequence[Sequence[Message]],
        max_tiles: int | None,
        source: str,
        draw: Draw | None,
        *,
        augment: bool,
    ) -> Pictures:
        tiling = self.config.tiling
        if max_tiles is not None:
            fewest = min(tiling.min_tiles, max_tiles)
            tiling = replace(tiling, max_tiles=max_tiles, min_tiles=fewest)
        num_images = max(
            sum(isinstance(part, ImageRef) for turn in turns for part in turn.parts)
            for turns in conversations
        )
        limits = limit_for(num_images, tiling) if self.config.share_tiles else tiling
        frames = (self.config.min_frames, self.config.max_frames)
        return Pictures(limits, source, augment, frames, draw)

    def _shown(self, messages: Sequence[Message], pictures: Pictures) -> list[Message]:
        for message in messages:  # texts first: they cost nothing to check
            check_text(message, self.control)
        return [pictures.show(message) for message in messages]

    def _example(
        self,
        segments: Sequence[Sequence[Piece]],
        parents: tuple[int, ...],
        pictures: Pictures,
        *,
        record_id: str,
    ) -> Example:
        encoded = self._encode(segments)
        for part, parent in zip(encoded, parents, strict=True):
            if parent == NO_PARENT:
                part.ids[:0] = self._encoder.start_ids
                part.trained[:0] = [False] * len(self._encoder.start_ids)
        input_ids = np.array([token for part in encoded for token in part.ids], dtype=np.int64)
        num_images = len(pictures.tiles)
        num_slots = int((input_ids == self.image_token_id).sum())
        if num_slots != num_images:
            raise DataError(
                f"{num_slots} image slots in the text, but {num_images} pictures",
                kind="image_count",
            )
        px = self.config.tiling.tile_px
        example = Example(
            source=pictures.source,
            record_id=record_id,
            input_ids=input_ids,
            trained=np.array([flag for part in encoded for flag in part.trained], dtype=np.bool_),
            segments=np.repeat(np.arange(len(encoded)), [len(part.ids) for part in encoded]),
            parents=parents,
            tiles=np.concatenate([np.empty((0, px, px, 3), dtype=np.uint8), *pictures.tiles]),
            tiles_per_image=tuple(len(tiles) for tiles in pictures.tiles),
            increments=pictures.increments(self.config.increment),
        )
        self._check_length(example)
        return example

    def _counts(self, pictures: Pictures, draw: Draw) -> tuple[int, ...]:
        """Visual tokens of each tile, where a compression is drawn."""
        config = self.config
        if self.compressed_tokens is None or not (config.compress or config.mixed):
            return ()
        sizes = (self.tokens_per_tile, self.compressed_tokens)
        drawn = pictures.compressed(config.compress, draw, mixed=config.mixed)
        return tuple(sizes[compressed] for compressed in drawn)

    def _encode(self, segments: Sequence[Sequence[Piece]]) -> list[_Encoded]:
        contents = [piece.content for pieces in segments for piece in pieces]
        ids = iter(self._encoder([text for text in contents if isinstance(text, str)]))
        encoded = [_Encoded() for _ in segments]
        for pieces, part in zip(segments, encoded, strict=True):
            for piece in pieces:
                is_text = isinstance(piece.content, str)
                part.add(next(ids) if is_text else self._image_ids, piece.trained)
        return encoded

    def _check_length(self, example: Example) -> None:
        num_tiles = example.num_tiles
        num_text_tokens = len(example.input_ids) - len(example.tiles_per_image)
        num_tokens = num_text_tokens + num_tiles * self.tokens_per_tile
        if num_tokens > self.config.max_tokens:
            raise DataError(
                f"{num_tokens} tokens ({num_text_tokens} of text and {num_tiles} tiles of "
                f"{self.tokens_per_tile}), but max_tokens is {self.config.max_tokens}",
                kind="too_long",
                remedy="raise max_tokens, lower max_tiles, or split the sample",
            )
        limit = self.config.max_positions
        place = {"image_token_id": self.image_token_id, "tokens_per_tile": self.tokens_per_tile}
        if limit is not None and (needed := num_positions(example, **place)) > limit:
            raise DataError(
                f"{needed} positions, but the model's dynamic RoPE holds {limit}",
                kind="too_long",
                remedy="draw the increment at random, lower max_tiles, or split the sample",
            )
