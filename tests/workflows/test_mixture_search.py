"""The mixture search from beginning to end, with tiny runs of the real recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.train.small_run import QUIET, small_config

from cascadevl.cli.main import main
from cascadevl.config import dump_config, load_config
from cascadevl.data.meta import read_meta
from cascadevl.errors import ConfigError, TrainingError
from cascadevl.model.loading import load
from cascadevl.model.presets import nano_config
from cascadevl.tasks.naming import held_out, open_entry
from cascadevl.train import start as train_start
from cascadevl.train.config import TrainConfig
from cascadevl.train.pretrain import pretrain
from cascadevl.train.run import TrainResult
from cascadevl.workflows import mixture_search
from cascadevl.workflows.held_out import held_out_losses
from cascadevl.workflows.mixture_config import MixtureSearchConfig
from cascadevl.workflows.mixture_search import SearchResult, search
from cascadevl.workflows.mixture_setup import EXAM_SEED


@pytest.fixture(scope="module", autouse=True)
def small() -> Generator[None, None, None]:
    """Nano with a few thousand parameters."""
    made = nano_config

    def small_nano(vocab_size: int, **overrides: Any) -> Any:
        vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text |= {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64}
        vision |= {"intermediate_size": 64}
        return made(vocab_size, vision_config=vision, text_config=text, **overrides)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_start, "nano_config", small_nano)
        yield


def task(name: str, length: int, **settings: Any) -> dict[str, Any]:
    return {
        "annotation": f"task:{name}",
        "task": {"settings": settings, "stage": "pretrain", "seed": 3},
        "length": length,
    }


def write_data(folder: Path) -> Path:
    """Two text sets, one of them a file with held-out records of its own, and two of pictures."""
    for name, numbers in (("train", range(40)), ("test", range(40, 52))):
        turns = [
            [{"from": "human", "value": f"{n} + 1?"}, {"from": "gpt", "value": f"{n + 1}"}]
            for n in numbers
        ]
        lines = [json.dumps({"conversations": each}) for each in turns]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    meta = {
        "file": {"annotation": "train.jsonl"},
        "sums": task("text", 80),
        "digits": task("handwriting", 100, difficulty="one", num_questions=1),
        "shapes": task("shapes", 100, num_questions=2),
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "held_out.json").write_text(json.dumps({"file": {"annotation": "test.jsonl"}}))
    return folder / "meta.json"


def make_config(folder: Path, **values: Any) -> MixtureSearchConfig:
    meta = write_data(folder)
    train = small_config(folder / "unused", data__meta=(meta,), batch__row_tokens=400)
    given: dict[str, Any] = {
        "train": train,
        "held_out": (folder / "held_out.json",),
        "multimodal": ({"digits": 1.0, "shapes": 1.0}, {"digits": 3.0, "shapes": 1.0}),
        "ratios": ("1:1", "1:3"),
        "stage1_tokens": 800,
        "stage2_tokens": 1200,
        "seeds": (5,),
        "examples": 4,
        "questions": 2,
        "answer_tokens": 4,
        "vocab_size": 400,
        "keep_models": True,
        "out": folder / "search",
    }
    return MixtureSearchConfig(**(given | values))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[MixtureSearchConfig, SearchResult]:
    config = make_config(tmp_path_factory.mktemp("search"))
    return config, search(config, console=QUIET)


def stages(result: SearchResult) -> dict[str, Any]:
    content = json.loads(result.table.with_suffix(".json").read_text("utf-8"))
    return {stage["stage"]: stage for stage in content["stages"]}


def test_stages_and_candidates_are_those_asked_for(
    finished: tuple[MixtureSearchConfig, SearchResult],
) -> None:
    found = stages(finished[1])
    names = {stage: [c["name"] for c in found[stage]["candidates"]] for stage in found}
    assert names == {
        # 40 lines and 80 scenes: by size is not the same as favouring the file
        "text": ["equal", "by-size", "more-file"],
        "multimodal": ["given-1", "given-2"],
        "ratio": ["1:1", "1:3"],
    }
    text = {c["name"]: c["shares"] for c in found["text"]["candidates"]}
    assert text["by-size"] == {"file": 0.333333, "sums": 0.666667}  # as is favouring the sums
    assert text["more-file"] == {"file": 0.666667, "sums": 0.333333}
    assert set(found["multimodal"]["candidates"][0]["shares"]) == {"digits", "shapes"}


def test_each_stage_takes_the_lowest_held_out_loss_and_hands_it_on(
    finished: tuple[MixtureSearchConfig, SearchResult],
) -> None:
    result = finished[1]
    found = stages(result)
    weights: dict[str, float] = {}
    for stage in ("text", "multimodal", "ratio"):
        by_hand = {}
        for candidate in found[stage]["candidates"]:
            (trial,) = candidate["trials"]
            sides: dict[bool, list[float]] = {}
            for name, loss in trial["losses"].items():
                sides.setdefault(name in ("file", "sums"), []).append(math.log(loss))
            by_hand[candidate["name"]] = sum(sum(v) / len(v) for v in sides.values()) / len(sides)
            assert candidate["mean_loss"] == pytest.approx(math.exp(by_hand[candidate["name"]]))
            if stage == "ratio":
                assert candidate["weights"] == weights
        chosen = min(by_hand, key=lambda name: by_hand[name])
        assert found[stage]["chosen"] == chosen
        taken = next(c for c in found[stage]["candidates"] if c["name"] == chosen)
        weights |= taken["weights"]
    assert result.weights == weights
    assert result.ratio == found["ratio"]["chosen"]


def test_candidates_start_alike_and_get_the_budget(
    finished: tuple[MixtureSearchConfig, SearchResult],
) -> None:
    config, result = finished
    settings = [
        json.loads(file.read_text("utf-8"))["settings"]["train"]
        for file in sorted(config.out.rglob("result.json"))
    ]
    assert len(settings) == 7
    for section in ("model", "optim", "batch"):
        assert all(each[section] == settings[0][section] for each in settings)
    assert {each["run"]["seed"] for each in settings} == {5}
    for stage, found in stages(result).items():
        trials = [trial for candidate in found["candidates"] for trial in candidate["trials"]]
        budget = config.stage2_tokens if stage == "ratio" else config.stage1_tokens
        assert all(0.8 * budget < trial["tokens"] < 1.25 * budget for trial in trials)
        # rows of pictures hold three tiles, fewer tokens than the 400 of rows of text: more steps
        assert stage != "multimodal" or all(t["steps"] > budget // 400 for t in trials)
        used = next(c for c in found["candidates"])["shares"]
        assert len(used) == {"text": 2, "multimodal": 2, "ratio": 4}[stage]


def test_scores_are_those_of_the_trained_model_on_held_out_records(
    finished: tuple[MixtureSearchConfig, SearchResult],
) -> None:
    config, result = finished
    folder = config.out / "ratio" / "1-to-3" / "seed-5"
    model, processor = load(folder / "model")
    specs = {spec.name: spec for spec in read_meta(config.train.data.meta[0])}
    (file,) = read_meta(config.held_out[0])
    tests = {
        name: open_entry(file if name == "file" else held_out(spec)) for name, spec in specs.items()
    }
    again = held_out_losses(
        model, processor, tests, config.train.data, num_examples=4, seed=EXAM_SEED
    )
    (trial,) = stages(result)["ratio"]["candidates"][1]["trials"]
    assert trial["losses"] == again
    assert set(trial["accuracies"]) == {"sums", "digits", "shapes"}  # a file asks no questions


def test_the_chosen_mixture_is_ready_to_train_on(
    finished: tuple[MixtureSearchConfig, SearchResult], tmp_path: Path
) -> None:
    config, result = finished
    ready = load_config(TrainConfig, files=[result.config])
    assert ready.data.weights == result.weights
    assert ready.data.mixture == result.ratio
    assert ready.run == replace(config.train.run, out=config.out / "run")
    words = [str(result.config), "--run.num_steps", "1", "--run.out", str(tmp_path / "run")]
    assert main(["train", "pretrain", *words]) == 0
    facts = json.loads((tmp_path / "run" / "mixture.json").read_text("utf-8"))
    assert facts["mixture"] == result.ratio


def test_the_table_names_every_candidate_and_the_lead(
    finished: tuple[MixtureSearchConfig, SearchResult],
) -> None:
    text = finished[1].table.read_text("utf-8")
    assert text.count("**chosen**") == 3
    for heading in ("within text", "within multimodal data", "text to multimodal"):
        assert heading in text
    assert text.count(" is ahead of ") == 3


def test_what_is_finished_is_not_run_again(
    finished: tuple[MixtureSearchConfig, SearchResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, first = finished
    runs: list[Path] = []

    def counted(train: TrainConfig, **more: Any) -> TrainResult:
        runs.append(train.run.out)
        return pretrain(train, **more)

    monkeypatch.setattr(mixture_search, "pretrain", counted)
    table = first.table.read_bytes()
    again = search(config, console=QUIET)
    assert runs == []
    assert (again.weights, again.ratio) == (first.weights, first.ratio)
    assert first.table.read_bytes() == table

    # one that was cut off between training and scores: trained to its end, examined once more
    lost = config.out / "multimodal" / "given-2" / "seed-5" / "result.json"
    scores = json.loads(lost.read_text("utf-8"))
    lost.unlink()
    search(config, console=QUIET)
    assert runs == [lost.parent]
    assert json.loads(lost.read_text("utf-8")) == scores
    assert first.table.read_bytes() == table


def test_a_search_of_other_settings_does_not_take_over_results(
    finished: tuple[MixtureSearchConfig, SearchResult],
) -> None:
    config = finished[0]
    with pytest.raises(TrainingError, match=r"exam\.examples was 4 and is 5"):
        search(replace(config, examples=5), console=QUIET)
    other = replace(config, train=replace(config.train, optim=replace(config.train.optim, lr=0.5)))
    with pytest.raises(TrainingError, match=r"train\.optim\.lr was 0\.001 and is 0\.5"):
        search(other, console=QUIET)


def test_a_search_that_is_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = ({"file": 1.0, "sums": 1.0},)
    config = make_config(tmp_path, keep_models=False, questions=0, text=only)
    stop = TrainResult(steps=1, finished=False, loss=1.0, counters={}, skipped={}, model_path=None)
    with monkeypatch.context() as patch:
        patch.setattr(mixture_search, "pretrain", lambda *_, **__: stop)
        with pytest.raises(TrainingError, match=r"stopped in .*given-1.* after step 1.*goes on"):
            search(config, console=QUIET)
    result = search(config, console=QUIET)
    assert list(stages(result)) == ["multimodal", "ratio"]  # one candidate of text: no run needed
    assert result.weights["file"] == 1.0
    assert not list(config.out.rglob("model"))
    assert not list(config.out.rglob("checkpoints"))
    assert stages(result)["ratio"]["candidates"][0]["accuracy"] is None


def test_the_command_prints_the_table_and_one_json_line(
    finished: tuple[MixtureSearchConfig, SearchResult],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, result = finished
    file = tmp_path / "search.yaml"
    file.write_text(dump_config(replace(config, out=Path("elsewhere"))), "utf-8")
    assert main(["mixture-search", str(file), f"out={config.out}"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {
        "weights": result.weights,
        "ratio": result.ratio,
        "table": str(result.table),
        "config": str(result.config),
    }
    assert main(["mixture-search", str(file), "boost=4", "--print_config"]) == 0
    assert "boost: 4.0\n" in capsys.readouterr().out
    assert main(["mixture-search", str(file), "bost=4"]) == 2
    assert "did you mean 'boost'" in capsys.readouterr().err


def with_meta(config: MixtureSearchConfig, meta: dict[str, Any], **values: Any) -> Any:
    path = config.out.parent / "other.json"
    path.write_text(json.dumps(meta))
    train = replace(config.train, data=replace(config.train.data, meta=(path,)))
    return replace(config, train=train, out=config.out.parent / "refused", **values)


def test_what_cannot_be_searched_is_said(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    nothing = replace(config, train=replace(config.train, data=small_config(tmp_path).data))
    with pytest.raises(ConfigError, match=r"train\.data\.meta"):
        search(nothing, console=QUIET)
    with pytest.raises(ConfigError, match="none of the data sets is multimodal"):
        search(with_meta(config, {"sums": task("text", 9)}, held_out=()), console=QUIET)
    with pytest.raises(ConfigError, match="'file' is no task, so it has no part that is held out"):
        search(replace(config, held_out=()), console=QUIET)
    with pytest.raises(ConfigError, match="held_out has 'file', which is no data set"):
        search(with_meta(config, {"sums": task("text", 9)}), console=QUIET)
    twice = replace(config.train.data, meta=config.train.data.meta * 2)
    with pytest.raises(ConfigError, match="two data sets of the meta files are named 'digits'"):
        search(replace(config, train=replace(config.train, data=twice)), console=QUIET)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratios": ("1:3", "as_given")}, "a candidate is a ratio"),
        ({"ratios": ("1-3",)}, "the mixture is '1-3'"),
        ({"ratios": ()}, "ratios and seeds must each have one"),
        ({"seeds": (1, 1)}, "stands there twice"),
        ({"stage2_tokens": 0}, "stage2_tokens is 0"),
        ({"choose_by": "accuracy"}, "choosing by accuracy needs some"),
        ({"boost": 1.0}, r"boost is 1\.0"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixtureSearchConfig(**values)
