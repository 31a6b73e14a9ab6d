"""Held-out losses equal those of plain transformers, one record at a time and without packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from tests.train.small_run import small_config, tokenizer
from transformers import InternVLForConditionalGeneration

from cascadevl.data.meta import DatasetSpec
from cascadevl.data.records import JsonlSource
from cascadevl.data.tiling import normalise
from cascadevl.errors import DataError
from cascadevl.model.loading import load, save
from cascadevl.sequence import expand
from cascadevl.train.config import ModelConfig
from cascadevl.train.sources import example_builder
from cascadevl.train.start import from_scratch
from cascadevl.workflows.held_out import held_out_losses


def write(folder: Path, name: str, records: list[dict[str, Any]]) -> JsonlSource:
    lines = "\n".join(map(json.dumps, records))
    (folder / f"{name}.jsonl").write_text(lines)
    return JsonlSource(DatasetSpec(name=name, annotation=folder / f"{name}.jsonl", root=folder))


def record(question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held")
    model, processor = from_scratch(ModelConfig(preset="nano"), tokenizer(), seed=3)
    save(model, processor, folder / "model")
    for name, size in (("small", (90, 60)), ("wide", (300, 100))):
        PIL.Image.linear_gradient("L").resize(size).convert("RGB").save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def sources(folder: Path) -> dict[str, JsonlSource]:
    text = [record(f"{n} + {n}?", f"it is {2 * n}, which is even") for n in range(7)]
    pictures = [
        record("<image>\nWhich?", "the small one", image="small.png"),
        record("<image>What?", "wide", image="wide.png"),
        record("<image>?", "gone", image="absent.png"),  # left out
    ]
    return {"text": write(folder, "text", text), "pictures": write(folder, "pictures", pictures)}


def losses(folder: Path, sources: dict[str, JsonlSource], count: int, **data: Any):
    model, processor = load(folder / "model")
    settings = small_config(folder, **{"data__max_tokens": 120, **data}).data
    return held_out_losses(model, processor, sources, settings, num_examples=count, seed=0)


def by_transformers(folder: Path, source: JsonlSource) -> float:
    """Sum over all usable records divided by their targets, with another library's loss."""
    _, processor = load(folder / "model")
    data = small_config(folder, data__max_tokens=120, data__jpeg=False).data
    builder = example_builder(data, processor, 0)
    peer = InternVLForConditionalGeneration.from_pretrained(folder / "model").eval()
    total, count = 0.0, 0
    for index in range(len(source)):
        try:
            example = builder(source[index])
        except DataError:
            continue
        placed = expand(
            example.input_ids,
            example.trained,
            example.segments,
            example.parents,
            image_token_id=processor.image_token_id,
            tokens_per_image=[n * builder.tokens_per_tile for n in example.tiles_per_image],
            increments=example.increments,
        )
        ids = torch.from_numpy(placed.input_ids)[None]
        labels = ids.masked_fill(~torch.from_numpy(placed.trained)[None], -100)
        pixels = normalise(example.tiles) if len(example.tiles) else None
        with torch.no_grad():
            loss = peer(input_ids=ids, pixel_values=pixels, labels=labels).loss
        num_targets = int(placed.trained.sum())
        total += float(loss) * num_targets
        count += num_targets
    return total / count


def test_losses_equal_transformers_one_record_at_a_time(
    folder: Path, sources: dict[str, JsonlSource]
) -> None:
    found = losses(folder, sources, 7)
    assert list(found) == ["text", "pictures"]
    for name, source in sources.items():
        assert found[name] == pytest.approx(by_transformers(folder, source), rel=1e-5)


def test_what_training_draws_at_random_is_fixed(
    folder: Path, sources: dict[str, JsonlSource]
) -> None:
    degraded = losses(folder, sources, 7, data__jpeg=True, data__increment="random")
    assert degraded == losses(folder, sources, 7, data__jpeg=False, data__increment=1.0)
    assert degraded != losses(folder, sources, 7, data__increment=0.25)


def test_fewer_records_are_a_sample_of_usable_ones(
    folder: Path, sources: dict[str, JsonlSource]
) -> None:
    assert losses(folder, sources, 2) == losses(folder, sources, 2)
    assert losses(folder, sources, 2)["text"] != losses(folder, sources, 7)["text"]
    # two of three pictures can be used, so two are found whichever is drawn first
    assert losses(folder, sources, 2)["pictures"] == losses(folder, sources, 7)["pictures"]


def test_a_source_without_usable_records_is_named(folder: Path) -> None:
    bad = write(folder, "bad", [record("<image>?", "x", image="absent.png")])
    with pytest.raises(DataError, match="no held-out record of 'bad' can be used") as caught:
        losses(folder, {"bad": bad}, 3)
    assert caught.value.kind == "no_sample"
