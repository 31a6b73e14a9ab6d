"""Reference log-probabilities: what is stored is what the model thought, once, whatever happens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tests.train.small_pairs import Pairs, mpo_config, pairs
from tests.train.small_passes import FailsOnce, Streamed
from tests.train.small_run import QUIET

from cascadevl.data.mixture import WeightedSource
from cascadevl.data.pairs import PairBuilder, PairCollate, digest
from cascadevl.errors import ConfigError, TrainingError
from cascadevl.train import reference as module
from cascadevl.train.mpo import MPOConfig, mpo
from cascadevl.train.reference import stored_reference
from cascadevl.train.sources import collate_config, example_builder
from cascadevl.train.start import start_from

Known = dict[bytes, tuple[float, float]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference") / "start"


class Pass:
    """All that a pass over the pairs needs."""

    def __init__(self, config: MPOConfig) -> None:
        self.config = config
        self.model, processor = start_from(config.model)
        self.build = PairBuilder(example_builder(config.data, processor, config.run.seed))
        packed = collate_config(config.batch, processor, self.model.config)
        self.collate = PairCollate(packed=packed)

    def __call__(self, sources: Any = None, accelerator: Any = None, part_size: int = 5) -> Known:
        return stored_reference(
            self.model,
            pairs() if sources is None else sources,
            self.build,
            self.collate,
            self.config,
            Accelerator(cpu=True) if accelerator is None else accelerator,
            part_size=part_size,
            console=QUIET,
        )


@pytest.mark.parametrize("packing", ["count", "fill"])
def test_every_pair_has_what_the_model_thinks_of_it(
    start: Path, tmp_path: Path, packing: str
) -> None:
    roomy = {"batch__packing": packing, "batch__row_tiles": 20}
    once = Pass(mpo_config(tmp_path / "run", start, **roomy))
    found = once()
    assert len(found) == 12
    for number in range(12):
        example = once.build(Pairs()[number])
        batch = once.collate([[example]])
        with torch.no_grad():
            alone = module._pair_logprobs(once.model, batch)[:, 0]
        assert found[digest(example)] == pytest.approx(alone.tolist(), rel=1e-4)
    files = sorted(file.name for file in (tmp_path / "run" / "reference").iterdir())
    assert files == ["facts.json", *(f"part-{n:06d}.safetensors" for n in range(3))]


def test_an_interrupted_pass_goes_on_with_what_is_missing(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Pass(mpo_config(tmp_path / "whole", start))()
    cut = Pass(mpo_config(tmp_path / "cut", start))
    computed = FailsOnce(module._pair_logprobs, at=5)  # two pairs a row, three rows a part
    monkeypatch.setattr(module, "_pair_logprobs", computed)
    with pytest.raises(MemoryError):
        cut()
    assert [f.name for f in (tmp_path / "cut" / "reference").glob("part*")] == [
        "part-000000.safetensors"
    ]
    assert cut() == whole
    assert computed.calls == 5 + 3 + 1
    assert cut() == whole
    assert computed.calls == 9  # nothing is computed twice


class OneOf(Accelerator):
    """One of several processes, which nobody waits for."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        super().__init__(cpu=True)

    @property
    def process_index(self) -> int:
        return self.rank

    @property
    def num_processes(self) -> int:
        return self.count

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def wait_for_everyone(self) -> None:
        """Nobody else is there."""


def test_processes_share_the_parts(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Pass(mpo_config(tmp_path / "whole", start))()
    shared = Pass(mpo_config(tmp_path / "shared", start))
    monkeypatch.setattr(module, "_read", lambda file: {})
    folder = tmp_path / "shared" / "reference"
    shared(accelerator=OneOf(0, 2))
    assert {f.name for f in folder.glob("part*")} == {
        "part-000000.safetensors",
        "part-000002.safetensors",
    }
    shared(accelerator=OneOf(0, 2))  # of what is missing now, the first
    monkeypatch.undo()
    assert shared() == whole


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data__max_tokens": 299}, "data"),
        ({"run__seed": 5}, "seed"),
        ({"batch__row_samples": 3}, "batch"),
    ],
)
def test_of_other_settings_nothing_is_taken(
    start: Path, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    Pass(mpo_config(tmp_path / "run", start))()
    with pytest.raises(TrainingError, match=f"another run: {words} changed"):
        Pass(mpo_config(tmp_path / "run", start, **changed))()


def test_of_another_model_or_other_data_nothing_is_taken(start: Path, tmp_path: Path) -> None:
    once = Pass(mpo_config(tmp_path / "run", start))
    once()
    with pytest.raises(TrainingError, match="sources changed"):
        once(pairs(11))
    with pytest.raises(TrainingError, match="part_size changed"):
        once(part_size=6)
    with torch.no_grad():
        once.model.lm_head.weight.add_(1.0)
    with pytest.raises(TrainingError, match="model changed"):
        once()


def test_a_model_that_is_broken_before_training_names_the_pair(start: Path, tmp_path: Path) -> None:
    once = Pass(mpo_config(tmp_path / "run", start))
    with torch.no_grad():
        once.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"colours:0: .*before any training"):
        once()


def test_pairs_that_changed_after_the_pass_stop_the_run(start: Path, tmp_path: Path) -> None:
    config = mpo_config(tmp_path / "run", start, run__num_steps=8)
    Pass(config)()

    class Changed(Pairs):
        def __getitem__(self, index: int, /) -> Any:
            record = super().__getitem__(index)
            return replace(record, branches=record.branches[::-1]) if index == 7 else record

    with pytest.raises(TrainingError, match=r"colours:7: .*the data have changed"):
        mpo(config, sources=[WeightedSource(source=Changed())], console=QUIET)


def test_a_stream_has_no_end_to_reach(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'river' is streamed.*adapters_off"):
        Pass(mpo_config(tmp_path / "run", start))([WeightedSource(source=Streamed(), weight=1.0)])


def test_pairs_in_another_order_of_sources_keep_their_values(start: Path, tmp_path: Path) -> None:
    two = [WeightedSource(source=Pairs(4, "a")), WeightedSource(source=Pairs(7, "b"))]
    found = Pass(mpo_config(tmp_path / "one", start))(two, part_size=3)
    other = Pass(mpo_config(tmp_path / "other", start))(two[::-1], part_size=4)
    assert found.keys() == other.keys()
    for key, value in found.items():
        assert value == pytest.approx(other[key], rel=1e-4)
