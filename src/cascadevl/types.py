"""The nouns that travel between the parts: messages, records, examples, batches, features.

They hold data and know nothing of files, models or configurations, so that every layer can
import them. The flow is ``Record -> Example -> Batch`` in training and ``Message -> Example``
in inference; the very same `Example` goes to training and to rollouts, so that both see one
prompt and one tiling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import PIL.Image
import torch
from jaxtyping import Bool, Float, Int, Int64, UInt8
from torch import Tensor

Role: TypeAlias = Literal["system", "user", "assistant", "tool", "pretrain"]

ProcessPrompt: TypeAlias = Literal["released", "short"]
"""What stands around question and steps that a process reward model judges."""

NO_PARENT = -1
"""Parent of a segment that continues nothing."""

PADDING_SEGMENT = -1
"""Segment of a token that only fills a row."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image as a message shows it: a file, its bytes, or the picture itself."""

    source: Path | bytes | PIL.Image.Image


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoRef:
    """A video as a message shows it.

    Attributes:
        source: A video file, a GIF, or a folder of frames.
        clip_s: Start and end of the part that counts, in seconds; None for the whole.
    """

    source: Path
    clip_s: tuple[float, float] | None = None


Part: TypeAlias = str | ImageRef | VideoRef


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation: who speaks, and the text and pictures in their order."""

    role: Role
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, role: Role, *parts: Part) -> Message:
        """Write ``Message.of("user", image, "What is this?")``."""
        return cls(role, parts)

    @property
    def text(self) -> str:
        """The text alone, without the pictures."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One sample of a data set, checked for form but with its pictures not opened yet.

    Attributes:
        source: Where it stands, ``file:line``; part of every error about it.
        record_id: Identity within its data set; augmentation, tiling and increment are
            functions of (seed, record id, epoch).
        messages: The turns. Exactly one of role ``pretrain`` for a pre-training sample.
        branches: Continuations that share ``messages`` as their beginning, each answered on its
            own: several questions about one picture, a chosen and a rejected answer, a group of
            rollouts. Empty for an ordinary conversation.
        dataset: Name of the data set in its meta file.
        max_tiles: The data set's own limit of tiles an image, or None.
        augment: Whether images are degraded by random JPEG compression in training.
    """

    source: str
    record_id: str
    messages: tuple[Message, ...]
    branches: tuple[tuple[Message, ...], ...] = ()
    dataset: str = ""
    max_tiles: int | None = None
    augment: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """One record as the model will see it, but for the number of visual tokens a tile.

    The text holds exactly one image-context token for each image (its slot), between ``<img>``
    and ``</img>``; `cascadevl.sequence.expand` repeats it once the tokens a tile are known.

    Attributes:
        source: Place of the record, for errors.
        record_id: Identity of the record.
        input_ids: Token ids.
        trained: Whether the token is a prediction target.
        segments: Number of the segment each token belongs to: contiguous, from 0 upwards. One
            segment for an ordinary conversation; with branches, segment 0 is what they share.
        parents: For each segment the segment it continues, or ``NO_PARENT``. A segment attends
            to its parents and, causally, to itself; its positions continue from its parent.
        tiles: RGB tiles of all images, in the order of the slots.
        tiles_per_image: Number of tiles of each image, thumbnail included.
        increments: Position step of each image's visual tokens (V2PE); empty in a prompt, where
            the model's configuration decides.
        tokens_per_tile: Visual tokens of each tile, where a compression was drawn (InternVL3.5
            report, ViCO); empty where nothing was: in training all tiles are full then, and of a
            prompt the router decides.
    """

    source: str
    record_id: str
    input_ids: Int[np.ndarray, " tokens"]
    trained: Bool[np.ndarray, " tokens"]
    segments: Int[np.ndarray, " tokens"]
    parents: tuple[int, ...]
    tiles: UInt8[np.ndarray, "tiles px px 3"]
    tiles_per_image: tuple[int, ...]
    increments: tuple[float, ...]
    tokens_per_tile: tuple[int, ...] = ()

    @property
    def num_tiles(self) -> int:
        """Tiles of all images together."""
        return len(self.tiles)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledAnswer:
    """One answer that a model drew for a question, with what was found of it.

    Attributes:
        text: The whole answer, thinking included, as a user would see it.
        token_ids: Its tokens as they were drawn, the end of turn included if it was drawn.
        finish_reason: ``stop`` if the model ended it, ``length`` if the limit did.
        correct: Whether its final answer agrees with the reference.
        rewards: Value of each named verifier, unweighted (`cascadevl.scoring.rewards`).
        reward: Their weighted sum, which training maximises.
        logprobs: The engine's log-probability of each token; empty where it was not kept.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    correct: bool
    rewards: Mapping[str, float]
    reward: float
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A question with the answers that one model drew for it: a group.

    Attributes:
        problem_id: Identity of the question within its material.
        prompt: The turns that were shown, the system's included where there is one.
        reference: The reference answer.
        answers: What was drawn, in the order of the draws.
        weight_version: Which weights drew them.
        metric: How an answer is compared with the reference (`cascadevl.tasks.base.Metric`); empty
            where nothing says whether an answer is right.
        choices: Letter and text of each choice, for metric ``"choice"``.
    """

    problem_id: str
    prompt: tuple[Message, ...]
    reference: str
    answers: tuple[SampledAnswer, ...]
    weight_version: str = ""
    metric: str = ""
    choices: tuple[tuple[str, str], ...] = ()

    @property
    def accuracy(self) -> float:
        """Share of correct answers; 0 of none."""
        return sum(answer.correct for answer in self.answers) / max(len(self.answers), 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Packed rows: what one call of the model in training takes.

    Attributes:
        input_ids: Token ids, image slots expanded.
        position_ids: Where each token sits (V2PE, float32); restarts with every sample.
        segments: Segment of each token, unique within a row; ``PADDING_SEGMENT`` for filling.
        parents: The parent of each token's segment, or ``NO_PARENT``.
        tiles: RGB tiles as their examples hold them, or None where no sample of the batch has an
            image. The model normalises them on its own device, in front of the vision tower.
        tokens_per_tile: Visual tokens of each tile.
        visual_index: Flat index (row * tokens + column) of every visual token, in tile order.
        target_index: Flat index of the hidden state that predicts each target.
        target_ids: The token to predict.
        target_weights: Loss weight of each target (w_i of token, square or sample averaging).
        target_samples: Index into ``sources`` of each target's sample.
        sources: Where the samples came from.
    """

    input_ids: Int64[Tensor, "rows tokens"]
    position_ids: Float[Tensor, "rows tokens"]
    segments: Int64[Tensor, "rows tokens"]
    parents: Int64[Tensor, "rows tokens"]
    tiles: UInt8[Tensor, "tiles px px 3"] | None
    tokens_per_tile: Int64[Tensor, " tiles"]
    visual_index: Int64[Tensor, " visual"]
    target_index: Int64[Tensor, " targets"]
    target_ids: Int64[Tensor, " targets"]
    target_weights: Float[Tensor, " targets"]
    target_samples: Int64[Tensor, " targets"]
    sources: tuple[str, ...]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name in self.__dataclass_fields__
            if hasattr(value := getattr(self, name), "to")
        }
        return replace(self, **moved)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segments != PADDING_SEGMENT).sum())

    @property
    def num_tiles(self) -> int:
        """Tiles of all samples."""
        return len(self.tokens_per_tile)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VisualFeatures:
    """What the vision half knows of some tiles: the one hand-over to the language half.

    It holds facts of the image only. What depends on the prompt (the route under a budget, the
    increment) is decided afterwards, for each prompt. Of a plain model these are visual tokens; of
    one with a router (InternVL3.5-Flash) patch features, of which any route can be made, and
    what the router thinks of each tile.

    Attributes:
        projected: Visual tokens of every tile in the language model's width, equally many each; or
            None.
        patches: Patch features of every tile, without the class token; or None.
        compress: The router's probability that a tile can do with fewer visual tokens; None
            without a router.
        weight_version: Which weights made them; features of other weights must not be mixed in.
    """

    projected: Float[Tensor, "tiles visual_tokens hidden"] | None = None
    patches: Float[Tensor, "tiles patches channels"] | None = None
    compress: Float[Tensor, " tiles"] | None = None
    weight_version: str = ""

    def __post_init__(self) -> None:
        """Refuse what holds nothing.

        Raises:
            ValueError: If there are neither visual tokens nor patch features.
        """
        if self.projected is None and self.patches is None:
            raise ValueError("features hold neither visual tokens nor patch features")

    @property
    def num_tiles(self) -> int:
        """Number of tiles."""
        held = self.patches if self.projected is None else self.projected
        assert held is not None, "checked when it was made"
        return len(held)
