"""The last two stages of the cascade: visual consistency, and the router that looks back at it."""

from __future__ import annotations

import json
from pathlib import Path

import PIL.Image
import pytest
import torch
from rich.console import Console
from tests.train.small_run import tokenizer

import cascadevl
from cascadevl.config import load_config
from cascadevl.errors import ConfigError
from cascadevl.model.loading import save
from cascadevl.train.config import ModelConfig
from cascadevl.train.start import from_scratch
from cascadevl.workflows.cascade import DONE, cascade
from cascadevl.workflows.cascade_config import CascadeConfig

QUIET = Console(quiet=True)

SMALL = """
stages: [vico, router]
vico:
  data: {max_tokens: 500, max_tiles: 2, jpeg: false, prefetch: 0}
  batch: {packing: count, row_samples: 4}
  optim: {lr: 3.0e-3, warmup_ratio: 0.0}
  run: {num_steps: 3, checkpoint_interval: 1}
router:
  data: {max_tokens: 500, max_tiles: 2, prefetch: 0}
  batch: {packing: count, row_samples: 4, row_tokens: 500}
  router: {records: 8, held_out: 0.3, chunk: 4, keep_share: 0.5}
  run: {num_steps: 2, checkpoint_interval: 1}
"""
COLOURS = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain nano, and pages of two colours with a question."""
    folder = tmp_path_factory.mktemp("cascade")
    model, processor = from_scratch(ModelConfig(preset="nano"), tokenizer(), seed=3)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(6)
    save(model, processor, folder / "start")
    lines = []
    for number, colour in enumerate(COLOURS):
        other = COLOURS[(number + 1) % 4]
        page = PIL.Image.new("RGB", (224, 112), colour)
        page.paste(PIL.Image.new("RGB", (112, 112), other), (112, 0))
        page.save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhich color?"},
            {"from": "gpt", "value": f"{colour} and {other}"},
        ]
        lines.append({"id": number, "image": f"{number}.png", "conversations": turns})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "pages.jsonl").write_text(text, "utf-8")
    meta = {"pages": {"root": str(folder), "annotation": str(folder / "pages.jsonl"), "length": 4}}
    (folder / "meta.json").write_text(json.dumps(meta), "utf-8")
    (folder / "cascade.yaml").write_text(SMALL, "utf-8")
    return folder


def config_of(folder: Path, *overrides: str) -> CascadeConfig:
    meta = folder / "meta.json"
    own = [f"model={folder / 'start'}", f"out={folder / 'out'}"]
    own += [f"{stage}.data.meta=[{meta}]" for stage in ("sft", "router")]  # vico takes that of sft
    return load_config(CascadeConfig, files=[folder / "cascade.yaml"], overrides=[*own, *overrides])


def test_the_router_is_trained_against_the_model_before_visual_consistency(folder: Path) -> None:
    summary = cascade(config_of(folder), console=QUIET)
    out = folder / "out"
    assert summary.model == str(out / "router/run/model")
    done = json.loads((out / "router" / DONE).read_text("utf-8"))
    assert done["place"]["reference"] == str(folder / "start")
    assert str(folder / "meta.json") in (out / "vico/run/config.yaml").read_text("utf-8")
    assert f"reference: {folder / 'start'}" in (out / "router/run/config.yaml").read_text("utf-8")
    assert done["facts"]["labelled"] == 8 * 3
    assert done["flops"] > 0
    model, _ = cascadevl.load(summary.model)
    before, _ = cascadevl.load(out / "vico/run/model")
    assert before.config.flash_absolute_threshold is None
    assert model.config.flash_absolute_threshold == pytest.approx(done["facts"]["threshold"])
    # What is done is not done again, and the reference is found again.
    again = cascade(config_of(folder), console=QUIET)
    assert [line.stage for line in again.lines] == ["start", "vico", "router"]
    assert again.model == summary.model


def test_a_router_without_a_stage_before_it_needs_a_reference(folder: Path) -> None:
    after = folder / "out/vico/run/model"
    alone = [f"model={after}", "stages=[router]", f"out={folder / 'alone'}"]
    with pytest.raises(ConfigError, match=r"name it with --router\.reference DIR"):
        cascade(config_of(folder, *alone), console=QUIET)
    named = [*alone, f"router.router.reference={folder / 'start'}"]
    assert cascade(config_of(folder, *named), console=QUIET).model.endswith("router/run/model")


def test_the_summary_says_how_many_visual_tokens_were_taken(folder: Path) -> None:
    own = [f"model={folder / 'out/vico/run/model'}", f"out={folder / 'counted'}"]
    own += ["stages=[router]", f"router.router.reference={folder / 'start'}"]
    own += ["router.router.keep_share=0.0"]  # every tile is compressed: 4 of 16 visual tokens
    own += ["exam.tasks=[shapes:easy@224]", "exam.questions=2", "exam.answer_tokens=2"]
    for _ in range(2):  # the second time from what the first has left
        lines = cascade(config_of(folder, *own), console=QUIET).lines
        assert [line.visual_share for line in lines] == [1.0, 0.25]
    assert "| visual tokens, % |" in (folder / "counted/summary.md").read_text("utf-8")
