"""The configuration of a GSPO run: what is asked, how answers are drawn, how they are learned from.

Defaults are those of the GSPO paper (arXiv 2507.18071) for the loss, and of the public scripts of
InternVL3.5's reinforcement learning for everything else, unless a comment names another source.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cascadevl.engine.packed_weights import Precision
from cascadevl.engine.requests import EngineConfig
from cascadevl.errors import ConfigError
from cascadevl.losses.gspo import ADVANTAGE_EPS
from cascadevl.scoring.rewards import RewardConfig
from cascadevl.train.config import BatchConfig, DataConfig, TrainConfig
from cascadevl.train.optim import OptimConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemsConfig:
    """What is asked: questions with references. A file or tasks; nothing if given in code.

    Attributes:
        file: JSONL of questions and answers (`cascadevl.tasks.problems.FileProblems`).
        root: Folder that the paths of its pictures start from; the file's own if None.
        tasks: Tasks to draw scenes of instead, each ``NAME`` or ``NAME:DIFFICULTY``.
        px: Side of the pictures of tasks; None for each task's own.
        scenes: Scenes of each task; when all have been asked, they come again in another order.
    """

    file: Path | None = None
    root: Path | None = None
    tasks: tuple[str, ...] = ()
    px: int | None = None
    scenes: int = 10_000

    def __post_init__(self) -> None:
        """Refuse two sources of questions."""
        if self.file is not None and self.tasks:
            raise ConfigError(
                f"problems.file is {self.file} and problems.tasks {self.tasks}; give one of them"
            )
        if self.scenes < 1:
            raise ConfigError(f"problems.scenes is {self.scenes}; draw at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    r"""How answers are drawn.

    Attributes:
        prompts: Questions of a rollout batch, on all processes together.
        group: Answers to each question.
        temperature: Of the draws. The ratios are those of the distribution that was drawn from,
            so there is no top-p or top-k.
        max_prompt_tokens: Longer questions are left out and counted; visual tokens are included.
        max_answer_tokens: Answers are cut off here (`RewardConfig.overlong`).
        thinking: Ask for reasoning through the system message.
        boxed: Ask for the answer within ``\boxed{}``.
        precision: ``model`` draws with the model in training itself. ``packed`` and ``int8`` keep
            its linear layers a second time, in the order of a CPU's kernels or in 8 bits, which
            answers faster on a CPU; int8 draws from a model that is not quite the one in training
            (`rollout_kl` says by how much).
        engine: How much the engine may hold and do at once.
        store: Folder of the store that every rollout batch is written into; None for none.
    """

    prompts: int = 512  # script: data.train_batch_size
    group: int = 16  # script: actor_rollout_ref.rollout.n
    temperature: float = 1.0  # script: not set, which is 1.0
    max_prompt_tokens: int = 8192  # script: data.max_prompt_length
    max_answer_tokens: int = 32768  # script: data.max_response_length
    thinking: bool = False
    boxed: bool = False
    precision: Literal["model", "packed", "int8"] = "model"
    engine: EngineConfig = field(default_factory=EngineConfig)
    store: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn or compared."""
        for name, least in (("prompts", 1), ("group", 2), ("max_prompt_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"rollout.{name} is {getattr(self, name)}; it must be at least {least}"
                )
        if self.max_answer_tokens < 1:
            raise ConfigError(
                f"rollout.max_answer_tokens is {self.max_answer_tokens}; it must be at least 1"
            )
        if not self.temperature > 0:
            raise ConfigError(
                f"rollout.temperature is {self.temperature}; greedy answers are all alike, so "
                "draw at a temperature above 0"
            )

    @property
    def packed(self) -> Precision | None:
        """How the engine's own copy of the linear layers is packed; None if it has none."""
        return None if self.precision == "model" else self.precision


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """How the model learns from a rollout batch.

    Attributes:
        updates: Mini-batches that a rollout batch is divided into, an update each.
        level: A ratio for each answer (GSPO), or for each token (GRPO), for comparison.
        clip_low: How far an answer that did worse may become less likely by this batch.
        clip_high: How far an answer that did better may become more likely.
        unbiased: Deviation of a group divided by one less than its size.
        eps: Added to that deviation.
    """

    updates: int = 4  # GSPO paper, section 5.1; 512 / 32 = 16 in the scripts
    level: Literal["sequence", "token"] = "sequence"
    clip_low: float = 3e-4  # GSPO paper, section 5.1; 0.2 in the scripts, by default
    clip_high: float = 4e-4  # GSPO paper, section 5.1; 0.2 in the scripts, by default
    unbiased: bool = False  # True in the public code (docs/decisions/0023)
    eps: float = ADVANTAGE_EPS

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        if self.updates < 1:
            raise ConfigError(f"policy.updates is {self.updates}; it must be at least 1")
        if not (0 < self.clip_low < 1 and self.clip_high > 0 and self.eps > 0):
            raise ConfigError(
                f"policy.clip_low is {self.clip_low}, policy.clip_high {self.clip_high} and "
                f"policy.eps {self.eps}; clip_low must lie between 0 and 1, the others above 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GSPOConfig(TrainConfig):
    """A whole run of GSPO.

    The keys of any training run mean what they mean there, with these differences. A step of
    ``run`` is one update. ``run.checkpoint_interval`` and ``run.num_steps`` end with a rollout
    batch. Of ``data`` only ``max_tokens`` and ``max_tiles`` are read, and of ``batch`` only
    ``rows``, ``row_tokens`` and ``row_tiles``: they bound what goes through the model at once, and
    change the speed alone.

    Attributes:
        problems: What is asked.
        rollout: How answers are drawn.
        rewards: What they are worth.
        policy: How the model learns from them.
    """

    data: DataConfig = field(default_factory=lambda: DataConfig(max_tokens=40960, jpeg=False))
    batch: BatchConfig = field(default_factory=lambda: BatchConfig(row_tokens=40960))
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-6,  # script; 8e-7 for 241B
            schedule="constant",  # script: not set, which is constant
            warmup_ratio=0.0,  # script: not set, which is none
            weight_decay=0.01,  # script: not set, which is 0.01
        )
    )
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)

    def __post_init__(self) -> None:
        """Refuse sizes that do not go into each other, and keys that mean nothing here."""
        _check_division("rollout.prompts", self.rollout.prompts, self.policy.updates)
        _check_division("run.num_steps", self.run.num_steps, self.policy.updates)
        longest = self.rollout.max_prompt_tokens + self.rollout.max_answer_tokens
        for name, limit in (
            ("data.max_tokens", self.data.max_tokens),
            ("batch.row_tokens", self.batch.row_tokens),
        ):
            if longest > limit:
                raise ConfigError(
                    f"rollout.max_prompt_tokens and max_answer_tokens are {longest} tokens "
                    f"together, but {name} is {limit}; raise it, or lower them"
                )
        if self.model.shard is not None and (self.lora or self.rollout.packed):
            raise ConfigError(
                f"model.shard is {self.model.shard}, but adapters are merged, and weights packed "
                "for a CPU, whole; leave out model.shard, or lora and rollout.precision"
            )
        self._check_unread()

    def _check_unread(self) -> None:
        """Refuse keys of other stages that nothing here would heed."""
        unread = {
            "model.drop_path": self.model.drop_path is not None,
            "data.meta": bool(self.data.meta),
            "data.jpeg": self.data.jpeg,
            "data.increment": self.data.increment != 1.0,
            "run.accumulation": self.run.accumulation is not None,
            "run.global_batch": self.run.global_batch is not None,
            "batch.packing": self.batch.packing != "fill",
        }
        if named := [name for name, is_set in unread.items() if is_set]:
            raise ConfigError(
                f"GSPO does not read {', '.join(named)}: questions come from problems.file or "
                "problems.tasks, as a user would show them, rollout.prompts and policy.updates say "
                "how large a step is, and nothing is dropped while log-probabilities are taken; "
                "leave the key out (data.jpeg false)"
            )


def _check_division(name: str, count: int, updates: int) -> None:
    rest = count % updates
    if rest:
        near = [n for n in (count - rest, count - rest + updates) if n]
        raise ConfigError(
            f"{name} is {count}, which policy.updates = {updates} does not divide; use "
            f"{' or '.join(map(str, near))}"
        )
