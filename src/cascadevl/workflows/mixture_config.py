"""What a search for a mixture tries, on what budget, and how it chooses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cascadevl.data.ratios import AS_GIVEN, parse_ratio
from cascadevl.errors import ConfigError
from cascadevl.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureSearchConfig:
    """A two-stage search of the mixture for one pre-training run.

    Attributes:
        train: The recipe of every candidate. Its meta files name the data sets; weights, mixture,
            number of steps, seed and folder are set by the search.
        held_out: Meta files with held-out records, under the names of the data sets. A task needs
            none: its test part is held out.
        text: Candidates of the first stage for the text side: weights of its data sets. Empty for
            equal weights, the weights by size, and each data set favoured once.
        multimodal: The same for the multimodal side.
        boost: Factor by which a data set is favoured.
        ratios: Candidates of the second stage, text to multimodal.
        stage1_tokens: Tokens that a candidate of the first stage is trained on.
        stage2_tokens: Tokens that a candidate of the second stage is trained on, whatever its
            ratio.
        seeds: Each candidate is trained once with each, from the same weights as the others.
        examples: Held-out records of each data set.
        questions: Held-out questions asked of each task; 0 asks none.
        answer_tokens: Longest answer.
        choose_by: ``loss`` takes the lowest geometric mean of held-out losses, text and multimodal
            data counting half each; ``accuracy`` the most right answers, rows counting the same.
        vocab_size: Tokens of the tokenizer that is made where a preset has none.
        keep_models: Keep the model of every candidate, not only its scores.
        out: Folder of the search.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    held_out: tuple[Path, ...] = ()
    text: tuple[Mapping[str, float], ...] = ()
    multimodal: tuple[Mapping[str, float], ...] = ()
    boost: float = 2.0
    ratios: tuple[str, ...] = ("1:1", "1:2", "1:3", "1:4")
    stage1_tokens: int = 100_000_000
    stage2_tokens: int = 200_000_000
    seeds: tuple[int, ...] = (0, 1, 2)
    examples: int = 200
    questions: int = 0
    answer_tokens: int = 32
    choose_by: Literal["loss", "accuracy"] = "loss"
    vocab_size: int = 1024
    keep_models: bool = False
    out: Path = Path("runs/mixture_search")

    def __post_init__(self) -> None:
        """Refuse what cannot be searched."""
        for ratio in self.ratios:
            if ratio == AS_GIVEN:
                raise ConfigError(f"ratios has {AS_GIVEN!r}; a candidate is a ratio such as 1:3")
            parse_ratio(ratio)
        if not self.ratios or not self.seeds:
            raise ConfigError("ratios and seeds must each have one entry at least")
        if len(set(self.ratios)) < len(self.ratios) or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("an entry of ratios or of seeds stands there twice")
        for name in ("stage1_tokens", "stage2_tokens", "examples", "answer_tokens", "vocab_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.questions < 0 or (self.choose_by == "accuracy" and self.questions == 0):
            raise ConfigError(
                f"questions is {self.questions}; choosing by accuracy needs some, and 0 asks none"
            )
        if not (math.isfinite(self.boost) and self.boost > 1):
            raise ConfigError(f"boost is {self.boost}; a favoured data set needs a factor above 1")
