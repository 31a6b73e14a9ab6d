"""The recipe of the router: labels once, the router alone trained, a threshold, exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train.run_folders import logged
from tests.train.small_router import NUM_RECORDS, Pages, pages, router_config, run, write_start
from tests.train.small_run import QUIET

import cascadevl
from cascadevl.data.mixture import WeightedSource
from cascadevl.data.row_stream import RowStream
from cascadevl.data.tiling import normalise
from cascadevl.errors import ConfigError, DataError
from cascadevl.model.loading import save
from cascadevl.model.routing import Thresholds, budget_for, compressed_tiles
from cascadevl.train.checkpoint import latest, load
from cascadevl.train.loss_journal import TileLosses
from cascadevl.train.router import FACTS, LOSSES, router
from cascadevl.train.router_batch import LabelledRecord, TileFeatures, TileStream
from cascadevl.train.router_choice import BEST
from cascadevl.train.router_config import RouterSection
from cascadevl.train.router_labels import labelled, parted

Start = tuple[Path, Path]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return write_start(tmp_path_factory.mktemp("router"))


@pytest.fixture(scope="module")
def done(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned its labels by heart."""
    out = tmp_path_factory.mktemp("done") / "run"
    values = {"run__num_steps": 40, "optim__lr": 2e-3, "router__keep_share": 0.6}
    result = run(out, start, run__eval_interval=20, **values)
    assert result.finished
    assert result.model_path == out / "model"
    assert result.skipped == {("pages", "corrupt_image"): result.skipped["pages", "corrupt_image"]}
    assert result.counters["tokens"] == 0
    return out


def entries(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "losses-000.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_router_learns_its_labels(done: Path) -> None:
    steps = [line for line in logged(done) if "loss" in line]
    assert len(steps) == 40
    late = steps[-8:]
    assert sum(line["accuracy"] for line in late) / 8 > 0.9
    assert sum(line["loss"] for line in late) / 8 < 0.4 < 0.6 < steps[0]["loss"]
    exams = [line for line in logged(done) if "held_out_loss" in line]
    assert [line["step"] for line in exams] == [20, 40]
    assert exams[-1].keys() >= {"held_out_accuracy", "held_out_auc", "held_out_kept"}


def test_nothing_but_the_router_changes(start: Start, done: Path) -> None:
    before, _ = cascadevl.load(start[0], dtype=torch.float32)
    after, _ = cascadevl.load(done / "model", dtype=torch.float32)
    weights = before.state_dict()
    changed = {n for n, x in after.state_dict().items() if not torch.equal(x, weights[n])}
    assert changed
    assert all(name.startswith("model.router.") for name in changed)
    assert after.config.trained_context == before.config.trained_context
    assert after.config.increment == before.config.increment


def test_the_threshold_keeps_the_share_of_the_held_out_tiles(done: Path) -> None:
    facts = json.loads((done / FACTS).read_text("utf-8"))
    model, processor = cascadevl.load(done / "model", dtype=torch.float32)
    budget = budget_for(model.config, None)
    assert budget == Thresholds(absolute=facts["threshold"])
    # Which of the records are held out is a function of their names; any tile is routed alone.
    config = router_config(done, (done, done))
    measured = [each for each in entries(done / LOSSES) if not each["fault"]]
    assert len(measured) < NUM_RECORDS
    kept = total = 0
    losses = [TileLosses(**each | {"compressed": tuple(each["compressed"])}) for each in measured]
    _, held_out = parted(labelled(losses, config.router)[0], config.router.held_out)
    names = {each.source.partition(":")[2] for each in held_out}
    assert 1 < len(names) < 12
    for name in names:
        example = processor.builder(Pages()[int(name)])
        with torch.no_grad():
            found = model.encode_images(normalise(example.tiles[:3])).compress
        assert found is not None
        kept += int((~compressed_tiles(found, budget)).sum())
        total += len(found)
    assert kept / total == pytest.approx(0.6, abs=0.15)


def test_labels_are_written_down_with_what_they_are_about(done: Path) -> None:
    facts = json.loads((done / FACTS).read_text("utf-8"))
    labels = facts["labels"]
    assert labels["within"] == pytest.approx(1 - labels["between"])
    assert 0.4 <= labels["keep"] <= 0.6
    assert labels["full_loss"] > 0
    assert facts["keep_share"] == 0.6
    assert facts["held_out"].keys() == {"loss", "accuracy", "kept", "auc"}


def test_every_draw_is_in_the_journal_once(done: Path) -> None:
    found = entries(done / LOSSES)
    assert [each["position"] for each in found] == list(range(NUM_RECORDS))
    by_fault = {each["fault"] for each in found}
    assert by_fault == {"", "no_tiles", "corrupt_image"}
    for each in found:
        number = int(each["record_id"] or 3)
        assert (each["fault"] == "no_tiles") == (number % 5 == 0)
        assert len(each["compressed"]) == (0 if each["fault"] else 3)
        assert (each["tokens"] > 0) == (not each["fault"])


def test_a_run_that_was_stopped_goes_on_bit_for_bit(start: Start, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, start, run__eval_interval=1)

    class Stop(BaseException):
        pass

    def stop(state: Any) -> None:
        if state.step == 3:
            raise Stop

    with pytest.raises(Stop):
        run(parts, start, run__eval_interval=1, on_step=stop)
    journal = (parts / LOSSES / "losses-000.jsonl").read_bytes()
    # Features that are not kept are encoded again, to the same bits.
    again = {"run__resume": True, "run__eval_interval": 1, "router__feature_bytes": 0}
    result = run(parts, start, **again)
    assert result.finished
    assert (parts / LOSSES / "losses-000.jsonl").read_bytes() == journal
    one, other = (load(latest(out / "checkpoints")) for out in (whole, parts))  # type: ignore[arg-type]
    assert one.step == other.step == 4
    for name, tensor in one.weights.items():
        assert torch.equal(tensor, other.weights[name]), name
    assert (whole / FACTS).read_bytes() == (parts / FACTS).read_bytes()
    one_best, other_best = (load_file(out / BEST) for out in (whole, parts))
    assert all(torch.equal(tensor, other_best[name]) for name, tensor in one_best.items())


def test_losses_serve_another_run_with_other_labels(
    start: Start, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("cascadevl.train.tile_losses.Measure.__call__", refuse)
    store = done / LOSSES
    result = run(tmp_path / "a", start, router__store=store, router__label="difference")
    assert result.finished
    facts = [json.loads((out / FACTS).read_text("utf-8")) for out in (done, tmp_path / "a")]
    assert facts[0]["labels"]["full_loss"] == facts[1]["labels"]["full_loss"]
    with pytest.raises(ConfigError, match=r"was begun with data.max_tiles = 2 and cannot"):
        run(tmp_path / "b", start, router__store=store, data__max_tiles=1)
    with pytest.raises(ConfigError, match=r"was begun with draws = .*\[42\].*\[7\]"):
        run(tmp_path / "c", start, router__store=store, run__seed=7)
    with pytest.raises(AssertionError, match="measured again"):  # only what is missing
        run(tmp_path / "d", start, router__store=store, router__records=NUM_RECORDS + 5)


def test_what_cannot_be_trained_is_refused(start: Start, tmp_path: Path) -> None:
    after, before = start
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="before has no router and no compressed tiles"):
        run(out, (before, before))
    with pytest.raises(ConfigError, match="label is ratio, which divides"):
        run(out, start, router__reference=None)
    with pytest.raises(ConfigError, match=r"what router\.reference says, to within rounding"):
        run(out, (after, after))
    with pytest.raises(ConfigError, match=r"router\.keep_share is 1\.5"):
        RouterSection(keep_share=1.5)
    with pytest.raises(ConfigError, match=r"router\.window is 0"):
        RouterSection(window=0)
    with pytest.raises(DataError, match=r"2 x corrupt_image of pages, first: pages:3"):
        run(tmp_path / "bad", start, router__records=NUM_RECORDS, data__max_skipped_share=0.0)


def test_without_a_reference_the_model_is_its_own(start: Start, tmp_path: Path) -> None:
    result = run(tmp_path / "run", start, router__reference=None, router__label="difference")
    assert result.finished
    losses = [each for each in entries(tmp_path / "run" / LOSSES) if not each["fault"]]
    assert all(abs(each["full"]) < 1e-6 for each in losses)
    assert all(max(each["compressed"]) > 1e-6 for each in losses)


def test_layers_that_released_code_never_runs_stay_as_they_are(
    start: Start, tmp_path: Path
) -> None:
    model, processor = cascadevl.load(start[0], dtype=torch.float32)
    model.config.flash_layers = "released"
    save(model, processor, tmp_path / "released")
    run(tmp_path / "run", (tmp_path / "released", start[1]), optim__weight_decay=0.5)
    after, _ = cascadevl.load(tmp_path / "run/model", dtype=torch.float32)
    before, weights = model.state_dict(), after.state_dict()
    for number in range(4):
        name = f"model.router.pooling.{number}.out_proj.weight"
        assert torch.equal(before[name], weights[name]) == (number > 1)


def some_records(number: int) -> list[LabelledRecord]:
    keep = torch.tensor([True, False])
    return [
        LabelledRecord(position=n, source=str(n), keep=keep, weights=torch.ones(2))
        for n in range(number)
    ]


def stream_of(rank: int = 0, world_size: int = 1, num_records: int = 4) -> TileStream:
    return TileStream(
        some_records(10),
        lambda position: torch.full((2, 3, 4), float(position)),
        seed=1,
        num_records=num_records,
        rank=rank,
        world_size=world_size,
        skipped=[("pages", "kind", 2, "first")],
    )


def test_an_epoch_sees_every_record_once_and_another_order_each_time() -> None:
    stream = stream_of(num_records=5)
    epochs = [[*next(stream).sources, *next(stream).sources] for _ in range(3)]
    assert all(sorted(epoch, key=int) == [str(n) for n in range(10)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    batch = next(stream)
    assert batch.patches[:, 0, 0].tolist() == [float(s) for s in batch.sources for _ in range(2)]
    assert (batch.num_tiles, batch.num_tokens) == (10, 0)


def test_processes_share_what_one_would_take() -> None:
    one = stream_of(num_records=8)
    two = [stream_of(rank, 2) for rank in range(2)]
    for _ in range(4):
        assert next(one).sources == (*next(two[0]).sources, *next(two[1]).sources)
    # From there on three processes may go on.
    state = two[0].state_dict()
    assert state["skipped"]
    assert not two[1].state_dict()["skipped"]
    three = [stream_of(rank, 3) for rank in range(3)]
    for stream in three:
        stream.load_state_dict(state)
    expected = stream_of(num_records=12)
    expected.load_state_dict(state)
    assert next(expected).sources == tuple(s for stream in three for s in next(stream).sources)


def test_features_are_kept_up_to_their_bytes(start: Start) -> None:
    model, processor = cascadevl.load(start[0], dtype=torch.float32)
    built: list[int] = []

    def build(position: int) -> Any:
        built.append(position)
        return processor.builder(Pages()[position])

    record = 4 * 64 * 128 * 3
    features = TileFeatures(model, build, max_bytes=2 * record)
    first = features(1)
    assert first.nbytes == record
    assert features(1) is first
    features(2)
    assert built == [1, 2]
    features(1)
    features(4)  # 2 was asked for longest ago
    features(1)
    assert built == [1, 2, 4]
    assert torch.equal(features(2), TileFeatures(model, build, max_bytes=0)(2))


def test_streamed_data_are_refused(start: Start, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"a": 1}]).to_iterable_dataset()
    stream = WeightedSource(source=RowStream(rows, name="rows"), weight=1.0)
    with pytest.raises(ConfigError, match="'rows' is streamed"):
        router(router_config(tmp_path, start), sources=[*pages(), stream], console=QUIET)
