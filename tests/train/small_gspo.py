"""A small setting for tests of reinforcement learning: nano, questions, rewards of letters."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tests.train.small_run import QUIET, tokenizer

from cascadevl.engine.requests import EngineConfig
from cascadevl.model.loading import save
from cascadevl.scoring.rewards import Response, RewardConfig
from cascadevl.tasks.problems import FileProblems, Problems, TaskProblems
from cascadevl.tasks.shapes import Shapes
from cascadevl.train.config import BatchConfig, DataConfig, ModelConfig
from cascadevl.train.gspo import gspo
from cascadevl.train.gspo_config import GSPOConfig, PolicyConfig, RolloutConfig
from cascadevl.train.loop import RunConfig
from cascadevl.train.lora import LoraConfig
from cascadevl.train.optim import OptimConfig
from cascadevl.train.run import TrainResult
from cascadevl.train.start import from_scratch

ENGINE = EngineConfig(
    num_pages=400
)  # by default 4 GiB, which many runs in one process would add up
ODD_LENGTH = f"{__name__}:odd_length"
EVEN_START = f"{__name__}:even_start"


def odd_length(response: Response) -> float:
    """Half of all random answers are of odd length: nearly every group has something to learn."""
    return float(len(response.text) % 2)


def even_start(response: Response) -> float:
    """The bandit: an arm is good if its first letter has an even number."""
    return float(response.text[:1] != "" and ord(response.text[0]) % 2 == 0)


def constant(_: Response) -> float:
    """Nothing to learn."""
    return 1.0


@functools.cache
def problems() -> Problems:
    """Pictures of shapes; few, so that the same questions are asked again."""
    return TaskProblems(tasks=[Shapes(px=112, num_questions=2)], num_scenes=3, worked_only=False)


def write_questions(folder: Path) -> Problems:
    """Questions of text alone."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"question": f"{name}?", "answer": "4"}) for name in ("what", "who", "how")]
    (folder / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return FileProblems(folder / "questions.jsonl")


def write_start(folder: Path) -> Path:
    """The folder of a nano with random weights: it draws all tokens about evenly."""
    model, processor = from_scratch(ModelConfig(preset="nano"), tokenizer(), seed=0)
    save(model, processor, folder / "start")
    return folder / "start"


def small_config(out: Path, start: Path, *, lora: bool = False, **values: Any) -> GSPOConfig:
    """Two rollout batches of two updates; ``section__key=value`` replaces a value."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": str(start), "precision": "float32"},
        "data": {"max_tokens": 128, "max_tiles": 1, "jpeg": False},
        "batch": {"row_tokens": 128, "row_tiles": 2},
        "optim": {"lr": 1e-3, "schedule": "constant", "warmup_ratio": 0.0},
        "rollout": {
            "prompts": 4,
            "group": 8,
            "max_prompt_tokens": 100,
            "max_answer_tokens": 6,
            "engine": ENGINE,
        },
        "rewards": {"weights": {ODD_LENGTH: 1.0}, "overlong": "keep"},
        "policy": {"updates": 2, "clip_low": 0.2, "clip_high": 0.2},
        "run": {"num_steps": 4, "checkpoint_interval": 2, "log_interval": 1},
    }
    for key, value in values.items():
        section, name = key.split("__")
        sections[section][name] = value
    return GSPOConfig(
        model=ModelConfig(**sections["model"]),
        data=DataConfig(**sections["data"]),
        batch=BatchConfig(**sections["batch"]),
        optim=OptimConfig(**sections["optim"]),
        rollout=RolloutConfig(**sections["rollout"]),
        rewards=RewardConfig(**sections["rewards"]),
        policy=PolicyConfig(**sections["policy"]),
        run=RunConfig(out=out, **sections["run"]),
        lora=LoraConfig(rank=4, dropout=0.3) if lora else None,
    )


def run(out: Path, start: Path, on_step: Any = None, **values: Any) -> TrainResult:
    """A run on pictures of shapes."""
    config = small_config(out, start, **values)
    return gspo(config, problems=problems(), on_step=on_step, console=QUIET)
