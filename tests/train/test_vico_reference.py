"""The stored reference of ViCO: what is kept is what the model thought with full tiles, once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from tests.train.small_pairs import mpo_config
from tests.train.small_passes import FailsOnce, Streamed
from tests.train.small_run import QUIET
from tests.train.small_vico import Stripes, stripes, vico_config

from cascadevl.data.collate import num_tokens
from cascadevl.data.consistency import ConsistencyCollate, with_full_tiles
from cascadevl.data.mixture import WeightedSource
from cascadevl.errors import ConfigError, TrainingError
from cascadevl.losses.vico import merged_kl, top_tokens, whole_kl
from cascadevl.tasks.base import TaskSource
from cascadevl.tasks.printed import Printed
from cascadevl.train import vico_reference as module
from cascadevl.train.config import DataConfig, ModelConfig
from cascadevl.train.sources import collate_config
from cascadevl.train.start import start_from
from cascadevl.train.vico import ViCOConfig, ViCOSection, make_compressible, sample_builder, vico
from cascadevl.train.vico_reference import StoredTokens, asked, stored_tokens
from cascadevl.types import Batch

K = 16


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vico-reference") / "start"
    mpo_config(folder.parent / "unused", folder)  # random weights: no training is needed here
    return folder


class Pass:
    """All that a pass over the records needs."""

    def __init__(self, config: ViCOConfig) -> None:
        self.config = config
        self.model, processor = start_from(config.model)
        make_compressible(self.model, config)
        self.build = sample_builder(config, processor, self.model.config)
        packed = collate_config(config.batch, processor, self.model.config)
        self.collate = ConsistencyCollate(packed=packed)

    def __call__(self, sources: Any = None, part_size: int = 5, k: int = K) -> StoredTokens:
        return stored_tokens(
            self.model,
            stripes(12) if sources is None else sources,
            self.build,
            self.collate,
            self.config,
            Accelerator(cpu=True),
            k=k,
            part_size=part_size,
            console=QUIET,
        )


@pytest.mark.parametrize("packing", ["count", "fill"])
def test_every_target_has_what_the_model_thinks_with_full_tiles(
    start: Path, tmp_path: Path, packing: str
) -> None:
    roomy = {"batch__packing": packing, "batch__row_tiles": 20}
    once = Pass(vico_config(tmp_path / "run", start, **roomy))
    found = once()
    assert len(found.places) == 12
    num_compressed = 0
    for number in range(12):
        example = once.build(Stripes()[number])
        num_compressed += bool(example.tokens_per_tile) and example.tokens_per_tile[0] == 4
        alone = asked(once.model, once.collate.packed([[with_full_tiles(example)]]), K)
        kept = found(example)
        assert kept is not None
        torch.testing.assert_close(kept.logprobs, alone.logprobs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kept.rest, alone.rest, rtol=1e-4, atol=1e-5)
        mass = kept.logprobs.exp().sum(1) + kept.rest.exp()
        torch.testing.assert_close(mass, torch.ones_like(mass))
    assert 0 < num_compressed < 12  # so that some were drawn compressed, and stored full
    files = sorted(file.name for file in (tmp_path / "run" / "reference").iterdir())
    assert files == ["facts.json", *(f"part-{n:06d}.safetensors" for n in range(3))]


def test_what_fits_a_row_only_when_it_is_compressed_is_known_too(
    start: Path, tmp_path: Path
) -> None:
    """Rows of 48 tokens, padded: the picture's sixteen tokens are too many, four are not."""
    tight = {"batch__packing": "fill", "batch__row_tokens": 48, "batch__fixed_rows": True}
    config = vico_config(tmp_path / "run", start, vico__reference="stored", **tight)
    once = Pass(config)
    examples = [once.build(Stripes()[number]) for number in range(12)]
    full = [num_tokens(with_full_tiles(example), 16) for example in examples]
    compressed = [num_tokens(replace(e, tokens_per_tile=(4,) * e.num_tiles), 16) for e in examples]
    assert max(full) > 48 >= max(compressed)
    found = once()
    assert all(found(example) is not None for example in examples)
    config = replace(config, data=replace(config.data, max_skipped_share=1.0))
    config = replace(config, run=replace(config.run, out=tmp_path / "other", num_steps=3))
    assert vico(config, sources=stripes(12), console=QUIET).finished


def test_a_record_is_known_in_every_epoch(start: Path, tmp_path: Path) -> None:
    once = Pass(vico_config(tmp_path / "run", start))
    found = once()
    drawn = {once.build(Stripes()[1], epoch=epoch).tokens_per_tile for epoch in range(12)}
    assert drawn == {(16,), (4,)}
    for epoch in range(12):
        assert found(once.build(Stripes()[1], epoch=epoch)) is not None
    assert found(once.build(Stripes()[13])) is None


def test_an_interrupted_pass_goes_on_with_what_is_missing(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Pass(vico_config(tmp_path / "whole", start))
    whole()
    cut = Pass(vico_config(tmp_path / "cut", start))
    computed = FailsOnce(module.asked, at=2)  # one row of six a part
    monkeypatch.setattr(module, "asked", computed)
    with pytest.raises(MemoryError):
        cut()
    cut()
    assert computed.calls == 2 + 2
    cut()
    assert computed.calls == 4  # nothing is computed twice
    for name in ("part-000000", "part-000001", "part-000002"):
        one, other = (
            safetensors.torch.load_file(tmp_path / run / "reference" / f"{name}.safetensors")
            for run in ("whole", "cut")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"data__max_tokens": 299}, "data"), ({"run__seed": 5}, "model, seed")],
)
def test_of_other_settings_nothing_is_taken(
    start: Path, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    Pass(vico_config(tmp_path / "run", start))()
    with pytest.raises(TrainingError, match=f"another run: {words} changed"):
        Pass(vico_config(tmp_path / "run", start, **changed))()
    with pytest.raises(TrainingError, match="another run: top_tokens changed"):
        Pass(vico_config(tmp_path / "run", start))(k=8)


def test_a_model_that_is_broken_before_training_names_the_sample(
    start: Path, tmp_path: Path
) -> None:
    once = Pass(vico_config(tmp_path / "run", start))
    with torch.no_grad():
        once.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"stripes:0: .*before any training"):
        once()


def test_samples_that_changed_after_the_pass_stop_the_run(start: Path, tmp_path: Path) -> None:
    config = vico_config(tmp_path / "run", start, vico__reference="stored", run__num_steps=8)
    Pass(config)()

    class Changed(Stripes):
        def __getitem__(self, index: int, /) -> Any:
            record = super().__getitem__(index)
            said = super().__getitem__(index + 1).messages[1]
            asked = record.messages[0]
            return replace(record, messages=(asked, said)) if index == 7 else record

    with pytest.raises(TrainingError, match=r"stripes:7: .*the data have changed"):
        vico(config, sources=[WeightedSource(source=Changed(12))], console=QUIET)


def test_a_stream_has_no_end_to_reach(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'river' is streamed.*vico\.reference copy"):
        Pass(vico_config(tmp_path, start))([WeightedSource(source=Streamed(), weight=1.0)])


def test_records_that_cannot_be_used_leave_a_part_of_nothing(start: Path, tmp_path: Path) -> None:
    class Broken(Stripes):
        def __getitem__(self, index: int, /) -> Any:
            record = super().__getitem__(index)
            return replace(record, messages=record.messages[:1]) if index < 5 else record

    found = Pass(vico_config(tmp_path / "run", start))([WeightedSource(source=Broken(12))])
    assert len(found.places) == 7


@pytest.mark.parametrize("difficulty", ["word", "line"])
def test_the_tokens_kept_by_default_lose_less_than_a_hundredth(difficulty: str) -> None:
    """On the shipped micro, all tiles compressed and nothing trained: docs/decisions/0028."""
    found = divergences(Printed(px=224, difficulty=difficulty))
    kept = ViCOSection().top_tokens
    assert found[0] > 0.1
    for k in (1, kept):
        assert found[0] - found[k] >= 0
    assert found[0] - found[kept] < 0.01 * found[0] < found[0] - found[1]


def divergences(task: Printed, num_scenes: int = 8) -> dict[int, float]:
    """Mean divergence of compressed from full tiles by tokens kept; 0 stands for all of them."""
    config = ViCOConfig(
        model=ModelConfig(path="micro", precision="float32"),
        data=DataConfig(max_tokens=2048, jpeg=False),
        vico=ViCOSection(compress=1.0),
    )
    once = Pass(config)
    source = TaskSource(task=task, length=num_scenes, seed=5)
    batch = once.collate([[once.build(source[number]) for number in range(num_scenes)]])
    assert batch.full is not None
    full, packed = (scores(once.model, seen) for seen in (batch.full, batch.packed))
    found = {0: whole_kl(packed, full).mean().item()}
    for k in (1, ViCOSection().top_tokens):
        found[k] = merged_kl(packed, top_tokens(full, k)).mean().item()
    return found


@torch.no_grad()
def scores(model: Any, batch: Batch) -> torch.Tensor:
    found: list[torch.Tensor] = []

    def head(logits: torch.Tensor, where: slice) -> torch.Tensor:
        found.append(logits)
        return logits[:, 0]

    model.eval()(batch=batch, head_fn=head)
    return torch.cat(found)
