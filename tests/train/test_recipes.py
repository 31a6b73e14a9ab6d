from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from tests.train.run_folders import logged
from tests.train.small_run import QUIET, small_config, sources, tokenizer
from torch import nn

import cascadevl
from cascadevl.data.mixture import WeightedSource
from cascadevl.errors import ConfigError, DataError, TrainingError
from cascadevl.sequence import INCREMENTS
from cascadevl.train.checkpoint import latest, load
from cascadevl.train.config import ModelConfig
from cascadevl.train.log import RunLog
from cascadevl.train.loop import TrainState
from cascadevl.train.optim import Optimiser
from cascadevl.train.pretrain import pretrain
from cascadevl.train.run import compile_bodies, take_up
from cascadevl.train.sft import sft
from cascadevl.train.sources import example_config, open_stream, sources_of_meta
from cascadevl.train.start import from_scratch, make_trainable
from cascadevl.types import Batch


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained nano; with it the folder of its run."""
    out = tmp_path_factory.mktemp("recipes") / "pretrain"
    config = small_config(
        out, run__num_steps=3, model__precision="bfloat16", data__increment="random"
    )
    pretrain(config, sources=sources(), tokenizer=tokenizer(), console=QUIET)
    return out


def chat_data(folder: Path, lines: Sequence[str]) -> Path:
    """A meta file with one data set: two good records and what is given."""
    PIL.Image.new("RGB", (60, 40), "red").save(folder / "red.png")
    turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "red"}]
    good = json.dumps({"id": 1, "image": "red.png", "conversations": turns})
    (folder / "chat.jsonl").write_text("\n".join([good, good, *lines]), encoding="utf-8")
    meta = {"colours": {"root": str(folder), "annotation": "chat.jsonl"}}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder / "meta.json"


def test_pretraining_learns_and_leaves_a_model_that_opens(pretrained: Path) -> None:
    losses = [line["loss"] for line in logged(pretrained)]
    assert losses[-1] < losses[0] - 0.3
    model, processor = cascadevl.load(pretrained / "model")
    assert model.dtype == torch.bfloat16
    assert model.config.increment == "auto"  # it was trained with increments drawn at random
    assert processor.system_message == ""
    facts = json.loads((pretrained / "run.json").read_text(encoding="utf-8"))
    assert facts["seed"] == 42
    assert "preset: nano" in (pretrained / "config.yaml").read_text(encoding="utf-8")


def test_the_exported_model_is_the_trained_one(pretrained: Path) -> None:
    path = latest(pretrained / "checkpoints")
    assert path is not None
    weights = load(path).weights
    model, _ = cascadevl.load(pretrained / "model")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_rows_of_a_fixed_length_change_nothing_but_the_padding(tmp_path: Path) -> None:
    results = [
        pretrain(
            small_config(tmp_path / str(fixed), batch__fixed_rows=fixed, run__num_steps=2),
            sources=sources(),
            tokenizer=tokenizer(),
            console=QUIET,
        )
        for fixed in (False, True)
    ]
    assert results[0].counters == results[1].counters
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    with pytest.raises(ConfigError, match="use packing fill"):
        small_config(tmp_path, batch__packing="count", batch__fixed_rows=True)


def test_a_global_batch_is_the_accumulation_it_comes_to(tmp_path: Path) -> None:
    sizes = {"run__accumulation": 3}, {"run__global_batch": 6}
    results = [
        pretrain(
            small_config(tmp_path / str(number), batch__rows=2, run__num_steps=2, **size),
            sources=sources(),
            tokenizer=tokenizer(),
            console=QUIET,
        )
        for number, size in enumerate(sizes)
    ]
    assert results[0].counters == results[1].counters
    assert results[0].loss == results[1].loss
    path = latest(tmp_path / "1" / "checkpoints")
    assert path is not None
    run = load(path).config["run"]  # as it was given, so that other processes can go on with it
    assert (run["accumulation"], run["global_batch"]) == (None, 6)


@pytest.mark.parametrize("recipe", [pretrain, sft])
def test_a_global_batch_is_checked_before_the_model_is_opened(
    recipe: Callable[..., object], tmp_path: Path
) -> None:
    config = small_config(
        tmp_path,
        model__preset=None,
        model__path=str(tmp_path / "not there"),
        batch__rows=2,
        run__global_batch=3,
    )
    with pytest.raises(ConfigError, match=r"global_batch is 3 rows.*use 2 or 4"):
        recipe(config, sources=sources(), console=QUIET)


def test_sft_goes_on_from_it_with_own_files_and_counts_what_it_skips(
    pretrained: Path, tmp_path: Path
) -> None:
    meta = chat_data(tmp_path, ['{"id": 3, "image": "gone.png", "conversations": 1,}'])
    config = small_config(
        tmp_path / "sft",
        model__preset=None,
        model__path=str(pretrained / "model"),
        data__meta=(meta,),
        data__prefetch=2,
        data__max_tiles=1,
        run__num_steps=3,
        run__eval_interval=2,
    )
    seen: list[int] = []

    def look(state: TrainState[Batch]) -> None:
        seen.append(state.step)

    result = sft(config, on_step=look, console=QUIET)
    assert result.finished
    assert result.steps == 3
    assert seen == [2, 3]
    assert {name for name, _ in result.skipped} == {"colours"}
    assert sum(result.skipped.values()) > 0
    assert result.model_path == tmp_path / "sft" / "model"
    model, _ = cascadevl.load(result.model_path)
    assert model.dtype == torch.float32


def test_frozen_parts_stay_and_the_others_move(pretrained: Path, tmp_path: Path) -> None:
    config = small_config(
        tmp_path / "sft",
        model__preset=None,
        model__path=str(pretrained / "model"),
        model__frozen=("vision", "language"),
        run__num_steps=2,
    )
    result = sft(config, sources=sources(), console=QUIET)
    before, _ = cascadevl.load(pretrained / "model", dtype=torch.float32)
    after, _ = cascadevl.load(str(result.model_path), dtype=torch.float32)
    moved = {
        name
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert moved
    assert all("multi_modal_projector" in name for name in moved)


def test_an_older_run_is_not_written_over(pretrained: Path) -> None:
    config = small_config(pretrained, run__num_steps=3)
    with pytest.raises(TrainingError, match=r"older run.*run\.resume"):
        pretrain(config, sources=sources(), tokenizer=tokenizer(), console=QUIET)


def test_a_finished_run_taken_up_again_only_exports_again(pretrained: Path) -> None:
    config = small_config(
        pretrained,
        run__num_steps=3,
        run__resume=True,
        model__precision="bfloat16",
        data__increment="random",
    )
    result = pretrain(config, sources=sources(), tokenizer=tokenizer(), console=QUIET)
    assert (result.steps, result.loss, result.finished) == (3, None, True)
    cascadevl.load(str(result.model_path))


def test_a_run_of_two_processes_goes_on_in_one_with_all_their_samples(tmp_path: Path) -> None:
    values = {"batch__packing": "count", "batch__row_samples": 2, "run__num_steps": 2}
    config = small_config(tmp_path / "run", **values)
    pretrain(config, sources=sources(), tokenizer=tokenizer(), console=QUIET)
    path = latest(config.run.out / "checkpoints")
    assert path is not None
    facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
    (path / "state.json").write_text(json.dumps(facts | {"world_size": 2}), encoding="utf-8")
    own = json.loads((path / "rank-00000.json").read_text(encoding="utf-8"))
    for rank, cursor in enumerate((8, 9)):  # four draws of each, none waiting for its row
        own["stream"] |= {"world_size": 2, "cursor": cursor, "num_draws": 4}
        (path / f"rank-{rank:05d}.json").write_text(json.dumps(own), encoding="utf-8")
    (path / "rank-00001.safetensors").write_bytes((path / "rank-00000.safetensors").read_bytes())
    resumed = small_config(tmp_path / "run", **values, run__resume=True)
    model, processor = from_scratch(resumed.model, tokenizer(), seed=1)
    accelerator = Accelerator(cpu=True)
    make_trainable(model, resumed.model, accelerator)
    with open_stream(sources(), processor, resumed, accelerator, model.config) as stream:
        state = TrainState(
            model=model,
            optimiser=Optimiser(model.named_parameters(), resumed.optim),
            stream=stream,
            accelerator=accelerator,
        )
        assert take_up(state, resumed) == path
        place = stream.state_dict()
    assert state.step == 2
    assert (place["cursor"], place["pending"], place["num_draws"]) == (9, [8], 8)
    weights = load(path).weights
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_another_configuration_cannot_take_a_run_up(pretrained: Path) -> None:
    config = small_config(
        pretrained,
        run__num_steps=3,
        run__resume=True,
        model__precision="bfloat16",
        data__increment="random",
        optim__lr=0.5,
    )
    with pytest.raises(TrainingError, match=r"optim\.lr was 0\.001 and is 0\.5"):
        pretrain(config, sources=sources(), tokenizer=tokenizer(), console=QUIET)


def test_a_start_and_data_are_asked_for(tmp_path: Path) -> None:
    nothing = small_config(tmp_path, model__preset=None)
    with pytest.raises(ConfigError, match=r"model\.path"):
        pretrain(nothing, sources=sources(), console=QUIET)
    with pytest.raises(ConfigError, match=r"model\.path"):
        sft(small_config(tmp_path), sources=sources(), console=QUIET)
    with pytest.raises(ConfigError, match=r"model\.tokenizer"):
        pretrain(small_config(tmp_path), sources=sources(), console=QUIET)
    with pytest.raises(ConfigError, match=r"data\.meta"):
        pretrain(small_config(tmp_path), tokenizer=tokenizer(), console=QUIET)


def test_a_run_on_bad_data_only_stops_with_the_counts(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n" * 5, encoding="utf-8")
    meta = {"bad": {"root": ".", "annotation": "bad.jsonl"}}
    (tmp_path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    config = small_config(tmp_path / "run", data__meta=(tmp_path / "meta.json",))
    with pytest.raises(DataError, match="records drawn cannot be used"):
        pretrain(config, tokenizer=tokenizer(), console=QUIET)


def test_sources_of_meta_weigh_by_their_records(tmp_path: Path) -> None:
    meta = chat_data(tmp_path, [])
    (weighted,) = sources_of_meta([meta])
    assert isinstance(weighted, WeightedSource)
    assert (weighted.source.name, len(weighted.source), weighted.weight) == ("colours", 2, None)


def test_examples_follow_the_model_but_for_what_the_run_chooses() -> None:
    model, processor = from_scratch(ModelConfig(preset="nano"), tokenizer(), seed=0)
    data = small_config(Path("unused"), data__increment="random", data__jpeg=False).data
    config = example_config(data, processor, seed=5)
    assert config.tiling == processor.tiling
    assert (config.template, config.system, config.seed) == ("internvl2_5", "", 5)
    assert (config.increment, config.jpeg, config.max_tokens) == ("random", False, 300)
    tight = example_config(replace(data, max_tiles=3), processor, seed=5)
    assert tight.tiling == replace(processor.tiling, max_tiles=3)
    assert model.config.tokens_per_tile == processor.tokens_per_tile


def test_weights_from_scratch_depend_on_the_seed_alone() -> None:
    start = ModelConfig(preset="nano")
    torch.manual_seed(1)
    first, _ = from_scratch(start, tokenizer(), seed=0)
    torch.manual_seed(2)
    again, _ = from_scratch(start, tokenizer(), seed=0)
    other, _ = from_scratch(start, tokenizer(), seed=1)
    for mine, same in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, same)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("before", [0.0, 0.9])
def test_drop_path_of_the_run_takes_the_place_of_the_models(before: float) -> None:
    model, _ = from_scratch(ModelConfig(preset="nano"), tokenizer(), seed=0)
    accelerator = Accelerator(cpu=True)
    tiles = torch.randint(0, 256, (2, 112, 112, 3), dtype=torch.uint8)

    def differs() -> bool:
        model.train()
        return not torch.equal(model.model.encode(tiles), model.model.encode(tiles))

    make_trainable(model, ModelConfig(drop_path=before, precision="float32"), accelerator)
    assert differs() == (before > 0)
    make_trainable(model, ModelConfig(drop_path=0.8, precision="float32"), accelerator)
    assert differs()
    assert model.config.drop_path_rate == 0.8
    make_trainable(model, ModelConfig(drop_path=0.0, precision="float32"), accelerator)
    assert not differs()


def test_positions_stay_exact_in_bfloat16() -> None:
    model, _ = from_scratch(ModelConfig(preset="nano"), tokenizer(), seed=0)
    make_trainable(model, ModelConfig(precision="bfloat16"), Accelerator(cpu=True))
    assert model.dtype == torch.bfloat16
    frequencies = model.model.language_model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert INCREMENTS[-1] * frequencies[0] == 1 / 256


def test_training_goes_on_without_a_compiler_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> object:
        raise RuntimeError("no C++ compiler was found\nand a long trace")

    monkeypatch.setattr(torch, "compile", broken)
    text = io.StringIO()
    console = Console(file=text, width=200)
    with RunLog(None, title="sft", num_steps=1, console=console) as log:
        assert compile_bodies(nn.Module(), log) is False
    assert "without torch.compile" in text.getvalue()
    assert "no C++ compiler was found" in text.getvalue()


def test_the_two_bodies_are_compiled_and_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def note(function: Callable[..., object], **settings: object) -> Callable[..., object]:
        owner = getattr(function, "__self__", None)
        compiled.append(type(owner).__name__)
        return function

    monkeypatch.setattr(torch, "compile", note)
    model, _ = from_scratch(ModelConfig(preset="nano"), tokenizer(), seed=0)
    names = list(model.state_dict())
    with RunLog(None, title="sft", num_steps=1, console=QUIET) as log:
        assert compile_bodies(model, log) is True
    assert compiled[1:] == ["InternVLVisionModel", "Qwen3Model"]
    assert list(model.state_dict()) == names
