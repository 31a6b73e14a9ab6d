"""How long the stages of a server take: counted operations and bytes over what hardware reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from cascadevl.errors import ConfigError
from cascadevl.planning.counts import Counts
from cascadevl.planning.hardware import Hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a request brings and wants, as a server sees it.

    Attributes:
        tiles: To be encoded.
        prompt_tokens: To be read, visual ones included.
        new_tokens: To be said.
    """

    tiles: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What all requests of a plan are like.

    Attributes:
        tiles: Tiles of its pictures.
        text_tokens: Tokens beside the visual ones: the question, and what the template adds.
        new_tokens: Tokens of the answer, at least 1.
        compressed_share: Share of the tiles that a router compresses; None without a router. An
            average over many requests, so it need not come to whole tiles.
    """

    tiles: int
    text_tokens: int = 64
    new_tokens: int = 32
    compressed_share: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be asked.

        Raises:
            ConfigError: If a number is out of range.
        """
        if self.tiles < 0 or self.text_tokens < 1 or self.new_tokens < 1:
            raise ConfigError(
                f"a question has {self.tiles} tiles, {self.text_tokens} tokens of text and "
                f"{self.new_tokens} of the answer; at least 0, 1 and 1 are needed"
            )
        if not 0 <= (self.compressed_share or 0.0) <= 1:
            raise ConfigError(f"the share of compressed tiles is {self.compressed_share}, not 0..1")

    def visual_tokens(self, counts: Counts) -> int:
        """Visual tokens of its prompt."""
        saved = counts.full_tokens - counts.compressed_tokens
        tile = counts.full_tokens - (self.compressed_share or 0.0) * saved
        return round(self.tiles * tile)

    def ask(self, counts: Counts) -> Ask:
        """What a model of these counts is asked."""
        return Ask(
            tiles=self.tiles,
            prompt_tokens=self.text_tokens + self.visual_tokens(counts),
            new_tokens=self.new_tokens,
        )


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of a language server computes.

    Attributes:
        prompt_tokens: Tokens of prompts that are read.
        prompt_pairs: Queries and keys of their attention.
        first_tokens: Prompts that end in this step, each with a first token.
        answers: Answers that get another token.
        context_tokens: Tokens that those see, all together.
    """

    prompt_tokens: int
    prompt_pairs: int
    first_tokens: int
    answers: int
    context_tokens: int


@runtime_checkable
class Service(Protocol):
    """How long things take, in seconds. The simulation knows nothing else of model and machine."""

    def encode_s(self, tiles: int) -> float:
        """Encoding tiles together, on one vision server."""
        ...

    def transfer_s(self) -> float:
        """Sending the visual tokens of a request."""
        ...

    def step_s(self, step: Step) -> float:
        """A step of a language server."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelService:
    """The seconds of a model on hardware.

    Attributes:
        counts: Of the model.
        question: What is asked.
        hardware: Each processor.
        group: Processors that compute together as a language server, or as a coupled one.
        encoders: Processors that encode together.
        compute_share: Share of the hardware's operations a second that is reached.
        memory_share: Share of its bytes a second that is reached.
        link_bytes_per_s: Between the halves.
    """

    counts: Counts
    question: Question
    hardware: Hardware
    group: int = 1
    encoders: int = 1
    compute_share: float
    memory_share: float = 0.8
    link_bytes_per_s: float = 25e9 / 8

    def __post_init__(self) -> None:
        """Refuse shares that no hardware reaches.

        Raises:
            ConfigError: If a share is not above 0 and at most 1.
        """
        for name in ("compute_share", "memory_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0, at most 1")

    def encode_s(self, tiles: int) -> float:
        """Encoding tiles together, on one vision server."""
        counts, share = self.counts, self.question.compressed_share
        tile = counts.tile_flops
        if share is not None:
            tile += counts.router_flops
            tile += share * (counts.compressed_tile_flops - counts.tile_flops)
        return self._seconds(tiles * tile, counts.vision_bytes, self.encoders)

    def transfer_s(self) -> float:
        """Sending the visual tokens of a request."""
        tokens = self.question.visual_tokens(self.counts)
        return tokens * self.counts.feature_bytes / self.link_bytes_per_s

    def step_s(self, step: Step) -> float:
        """A step of a language server: operations, or memory where that takes longer."""
        counts = self.counts
        tokens = step.prompt_tokens + step.answers
        flops = tokens * counts.token_flops
        flops += (step.prompt_pairs + step.context_tokens) * counts.pair_flops
        flops += (step.first_tokens + step.answers) * counts.head_flops
        read = counts.read_bytes(tokens) + step.context_tokens * counts.cache_bytes
        return self._seconds(flops, read, self.group)

    def _seconds(self, flops: float, read_bytes: float, processors: int) -> float:
        hardware = self.hardware
        compute = flops / (self.compute_share * hardware.flops_per_s)
        memory = read_bytes / (self.memory_share * hardware.bytes_per_s)
        return max(compute, memory) / processors
