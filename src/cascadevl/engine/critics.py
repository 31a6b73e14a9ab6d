"""Who chooses among several answers: a reward model in both of its uses, or a vote.

A reward model may be a checkpoint of its own, or an adapter of the very model that answers. Then
the weights are shared, and pictures that were encoded to be answered are not encoded again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.best_of_n import BestOfConfig, ByReward, ByVotes, Scorer, Selection
from cascadevl.engine.engine import Engine
from cascadevl.engine.process_reward import Encode, ProcessRewardConfig, ProcessRewardModel
from cascadevl.engine.vision import tile_encoder
from cascadevl.errors import ConfigError
from cascadevl.model.adapter_files import with_adapter
from cascadevl.model.adapters import adapts_only_language
from cascadevl.model.modeling import CascadeVLForConditionalGeneration


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Critics:
    """What answers can be chosen by.

    Attributes:
        process: Scores solutions step by step; None where there is no reward model.
        outcome: Scores them as a whole.
    """

    process: Scorer | None = None
    outcome: Scorer | None = None

    @property
    def has_reward_model(self) -> bool:
        """Whether there is anything but votes."""
        return self.process is not None

    def selection(self, config: BestOfConfig) -> Selection:
        """How an answer is chosen.

        Args:
            config: By what.

        Raises:
            ConfigError: If that needs a reward model, and there is none.
        """
        if config.select == "vote":
            return ByVotes()
        scorer = self.process if config.select == "prm" else self.outcome
        if scorer is None:
            raise ConfigError(
                f"there is no reward model, so that nothing can be chosen by {config.select!r}; "
                f"name one with --reward-model, or choose by 'vote'"
            )
        return ByReward(scorer=scorer, stop_score=config.stop_score)


def critics_of(
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    config: ProcessRewardConfig | None = None,
    *,
    encode: Encode | None = None,
) -> Critics:
    """A reward model in both of its uses.

    Args:
        model: Trained as a process reward model.
        processor: Its processor.
        config: How solutions are scored.
        encode: See `ProcessRewardModel`; None encodes with the model itself, and remembers what it
            has seen, because answers that are drawn in rounds are judged in rounds.

    Raises:
        ConfigError: If it cannot be one.
    """
    config, encode = config or ProcessRewardConfig(), encode or tile_encoder(model)
    whole = replace(config, rules=replace(config.rules, max_steps=1))
    return Critics(
        process=ProcessRewardModel(model, processor, config, encode=encode),
        outcome=ProcessRewardModel(model, processor, whole, encode=encode),
    )


def adapter_critics(
    engine: Engine,
    adapter: Path,
    config: ProcessRewardConfig | None = None,
    *,
    shares_features: bool = True,
) -> Critics:
    """A reward model that is an adapter of the model that answers.

    Args:
        engine: Answers, with the base model as it is stored, and a processor.
        adapter: Folder of the adapter.
        config: How solutions are scored.
        shares_features: Whether visual tokens are taken from the engine. Not where it is stepped in
            another thread without a pause: who asks it for them would wait long.

    Raises:
        CheckpointError: If the adapter is of another model, or cannot be opened.
        ConfigError: If the engine's weights are packed: there is then nothing to put it beside.
    """
    if engine.is_packed:
        raise ConfigError(
            f"{adapter} is an adapter of the model that answers, whose weights are packed; use "
            f"--weights stored, or the model that the adapter was merged into"
        )
    assert engine.processor is not None, "questions are prepared with the engine's processor"
    model = with_adapter(engine.model, adapter)
    shares_features = shares_features and adapts_only_language(model)
    encode = engine.visual_tokens if shares_features else None
    return critics_of(model, engine.processor, config, encode=encode)
