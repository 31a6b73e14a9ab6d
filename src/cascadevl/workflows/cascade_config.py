"""What a cascade of training stages does, in one configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from cascadevl.engine.packed_weights import Precision
from cascadevl.errors import ConfigError
from cascadevl.train.config import TrainConfig
from cascadevl.train.gspo_config import GSPOConfig, ProblemsConfig
from cascadevl.train.mpo import MPOConfig
from cascadevl.train.router_config import RouterConfig
from cascadevl.train.vico import ViCOConfig
from cascadevl.workflows.query_filter import LEAST_ACCURACY, MOST_ACCURACY

StageName: TypeAlias = Literal[
    "pretrain", "sft", "rollouts", "pairs", "mpo", "filter", "gspo", "vico", "router"
]

ORDER: tuple[StageName, ...] = get_args(StageName)
"""Stages in the order of the InternVL3.5 report: what is sampled once serves both kinds of RL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSection:
    """How answers are sampled for pairs and for the choice of questions.

    Attributes:
        num_samples: Answers to each question (MMPR: up to 32).
        temperature: Of the draws.
        max_tokens: Answers are cut off here.
        thinking: Reason first, through the Thinking system message.
        boxed: Ask for the answer within a box.
        precision: How the engine's linear layers are packed on a CPU; None for not at all.
        chunk: Groups of questions answered together: the unit in which sampling is resumed.
        seed: Of the draws.
    """

    num_samples: int = 32
    temperature: float = 1.0
    max_tokens: int = 4096
    thinking: bool = False
    boxed: bool = False
    precision: Precision | None = None
    chunk: int = 64
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PairsSection:
    """Which pairs are made of the sampled answers.

    Attributes:
        max_pairs: Most pairs of a question; None for the rule of MMPR.
        seed: Of their choice.
    """

    max_pairs: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterSection:
    """Which questions online RL is given (MMPR-Tiny).

    Attributes:
        least: Lowest share of right answers.
        most: Highest.
    """

    least: float = LEAST_ACCURACY
    most: float = MOST_ACCURACY


@dataclass(frozen=True, kw_only=True, slots=True)
class ExamSection:
    """Held-out questions, asked before the first stage and after each that trains.

    Attributes:
        tasks: Rows, each ``NAME`` or ``NAME:DIFFICULTY``; their test parts are asked. Empty asks
            nothing.
        px: Side of their pictures; None for each task's own.
        questions: Questions of each row.
        answer_tokens: Longest answer.
        temperatures: Every question is answered once at each of these; 0 is greedily. Online
            reinforcement changes first how often drawn answers are right.
        seed: Of the questions.
    """

    tasks: tuple[str, ...] = ()
    px: int | None = None
    questions: int = 400
    answer_tokens: int = 64
    temperatures: tuple[float, ...] = (0.0,)
    seed: int = 1000

    def __post_init__(self) -> None:
        """Refuse what cannot be asked.

        Raises:
            ConfigError: If there is no temperature, or one below 0.
        """
        if not self.temperatures or min(self.temperatures) < 0:
            raise ConfigError(
                f"exam.temperatures is {list(self.temperatures)}; give at least one, 0 for greedy "
                f"answers or more"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CascadeConfig:
    """The stages of the InternVL3.5 report one after the other, each on the model of the last.

    Of the sections of stages, the model, the folder and what a stage takes from an earlier one are
    set by the cascade; everything else is as in a run of that stage alone.

    Attributes:
        model: Where it starts, unless ``pretrain`` is the first stage and has a preset.
        stages: Stages to go through; they are always taken in the order of the report.
        pretrain: Native multimodal pre-training.
        sft: Supervised fine-tuning.
        problems: Questions that answers are sampled to, and that GSPO asks without ``filter``.
        rollouts: How answers are sampled.
        pairs: Which pairs are made of them.
        mpo: Offline RL.
        filter: Which questions are kept.
        gspo: Online RL; its own questions count only if the cascade has none.
        vico: Visual consistency, for models that compress tiles; on the data of ``sft`` unless it
            names others.
        router: Training of the router, on the same rule; what ``vico`` began with is its reference.
        exam: What every model is asked.
        out: Folder; each stage has one in it.
    """

    model: str | None = None
    stages: tuple[StageName, ...] = ORDER
    pretrain: TrainConfig = field(default_factory=TrainConfig)
    sft: TrainConfig = field(default_factory=TrainConfig)
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    rollouts: SamplingSection = field(default_factory=SamplingSection)
    pairs: PairsSection = field(default_factory=PairsSection)
    mpo: MPOConfig = field(default_factory=MPOConfig)
    filter: FilterSection = field(default_factory=FilterSection)
    gspo: GSPOConfig = field(default_factory=GSPOConfig)
    vico: ViCOConfig = field(default_factory=ViCOConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    exam: ExamSection = field(default_factory=ExamSection)
    out: Path = Path("runs/cascade")

    def __post_init__(self) -> None:
        """Refuse stages that lack what they need."""
        if len(set(self.stages)) < len(self.stages) or not self.stages:
            raise ConfigError(f"stages are {self.stages}; name at least one, and each once")
        needs: dict[StageName, StageName] = {
            "pairs": "rollouts",
            "mpo": "pairs",
            "filter": "rollouts",
        }
        for stage, needed in needs.items():
            if stage in self.stages and needed not in self.stages:
                raise ConfigError(
                    f"the stage {stage} works on what {needed} leaves, which is not among the "
                    f"stages {self.stages}; add it"
                )
        if self.model is None and "pretrain" not in self.stages:
            raise ConfigError(
                "a cascade without pretrain starts from a model; name one with model=DIR"
            )

    @property
    def ordered(self) -> tuple[StageName, ...]:
        """The stages in the order in which they are taken."""
        return tuple(stage for stage in ORDER if stage in self.stages)
