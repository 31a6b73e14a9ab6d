"""Positions are float32 all the way to the rotary embedding; what bfloat16 ones would break.

The tests look at the rotation that reaches the first layer, so a cast anywhere on the way is seen.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.model.bodies import BODIES, body_model
from tests.model.packed import head, packed_batch
from tests.model.small import small_model
from torch import Tensor

from cascadevl.model.modeling import CascadeVLForConditionalGeneration

ROOT = Path(__file__).parents[2]
FAR = 1000  # where the tokens stand: there bfloat16 holds every eighth position only
NUM_TEXT, NUM_VISUAL = 200, 256
FREQUENCIES = 1e4 ** (-torch.arange(8, dtype=torch.float64) / 8)  # of small_model's heads


def far_positions(increment: float) -> Tensor:
    """Text, one image and text again: (1, tokens)."""
    steps = torch.tensor([1.0] * NUM_TEXT + [increment] * NUM_VISUAL + [1.0] * 20)
    return (FAR - 1 + steps.double().cumsum(0)).float()[None]


def embeddings(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, NUM_TEXT + NUM_VISUAL + 20, 32, generator=generator).to(dtype)


def rotation(
    model: CascadeVLForConditionalGeneration, run: Callable[[], object]
) -> tuple[Tensor, Tensor]:
    """The cosines and sines that reach the first layer of the text body."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(module: object, args: tuple[object, ...], kwargs: dict[str, tuple[Tensor, Tensor]]):
        cos, sin = kwargs["position_embeddings"]
        seen.append((cos[0].detach().double(), sin[0].detach().double()))

    layer = model.model.language_model.layers[0]
    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    run()
    handle.remove()
    return seen[0]


def error_of_looking_back(cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """A head that attends to the token one position back: how many positions off it lands.

    With equal queries and keys the scores are those of the rotations alone, largest where the key
    sits where the query looks. Mean over the text before the image.
    """
    cos, sin = cos[:, : len(FREQUENCIES)], sin[:, : len(FREQUENCIES)]
    query_cos = cos * FREQUENCIES.cos() + sin * FREQUENCIES.sin()
    query_sin = sin * FREQUENCIES.cos() - cos * FREQUENCIES.sin()
    found = positions[0][(query_cos @ cos.T + query_sin @ sin.T).argmax(1)]
    return (found - (positions[0] - 1)).abs()[1:NUM_TEXT].mean()


PRECISIONS = ("float32", "bfloat16 weights", "autocast")


def prepared(precision: str, model: CascadeVLForConditionalGeneration) -> torch.autocast:
    """Bring a model to a precision; the context to run it in."""
    if precision == "bfloat16 weights":
        model.to(torch.bfloat16)
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_attention_finds_the_token_before_and_with_bfloat16_positions_it_does_not(
    precision: str,
) -> None:
    model = small_model()
    positions = far_positions(1 / 256)
    embeds = embeddings(torch.bfloat16 if precision == "bfloat16 weights" else torch.float32)
    context = prepared(precision, model)

    def run(where: Tensor) -> None:
        with context, torch.no_grad():
            model(inputs_embeds=embeds, position_ids=where)

    cos, sin = rotation(model, lambda: run(positions))
    assert error_of_looking_back(cos, sin, positions) < 0.01
    cos, sin = rotation(model, lambda: run(positions.bfloat16().float()))
    assert error_of_looking_back(cos, sin, positions) > 2


@pytest.mark.parametrize("increment", [1 / 256, 1 / 16, 1.0])
def test_rotations_of_an_image_stay_apart_and_with_bfloat16_positions_they_fall_together(
    increment: float,
) -> None:
    model = small_model()
    positions = far_positions(increment)
    counts = []
    for where in (positions, positions.bfloat16().float()):
        with torch.no_grad():
            run = lambda p=where: model(inputs_embeds=embeddings(), position_ids=p)  # noqa: E731
            cos, sin = rotation(model, run)
        image = slice(NUM_TEXT, NUM_TEXT + NUM_VISUAL)
        counts.append(len(torch.cat([cos[image], sin[image]], dim=1).unique(dim=0)))
    # Beyond 1,024 bfloat16 holds multiples of 8: the image spans 1, 16 or 256 positions.
    assert counts == [NUM_VISUAL, {1 / 256: 1, 1 / 16: 3, 1.0: 33}[increment]]


def test_answers_with_bfloat16_positions_are_others() -> None:
    model = small_model()
    positions = far_positions(1 / 256)
    with torch.no_grad():
        exact, again, rounded = (
            model(inputs_embeds=embeddings(), position_ids=where).logits
            for where in (positions, positions.clone(), positions.bfloat16().float())
        )
    assert torch.equal(exact, again)
    assert (exact - rounded).abs().max() > 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("body", BODIES)
def test_training_gives_every_position_a_rotation_of_its_own(body: str, precision: str) -> None:
    """The packed row of a training step, with every text body, gradient checkpointing on."""
    model = body_model(body)
    context = prepared(precision, model)
    model.activation_checkpointing_enable()
    model.train()
    batch = packed_batch([[2, 1]])
    batch = replace(batch, position_ids=batch.position_ids + 400)  # bfloat16 holds even ones

    def step() -> None:
        with context:
            model(batch=batch, head_fn=head(batch)).sum().backward()

    cos, sin = rotation(model, step)
    assert len(torch.cat([cos, sin], dim=1).unique(dim=0)) == len(batch.position_ids.unique())


def test_checkpointing_computes_the_same_gradients_from_fractional_positions() -> None:
    grads = []
    for checkpointing in (False, True):
        model = small_model()
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        batch = packed_batch([[2, 1], [1]])
        batch = replace(batch, position_ids=FAR + batch.position_ids / 256)
        (model(batch=batch, head_fn=head(batch)) * batch.target_weights).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for without, with_it in zip(*grads, strict=True):
        assert torch.equal(without, with_it)


COMPILED = """
import torch
from tests.model.small import small_model
from tests.model.test_v2pe_precision import embeddings, far_positions

for dtype in (torch.float32, torch.bfloat16):
    plain, compiled = small_model().to(dtype), small_model().to(dtype)
    compiled.model.language_model.compile(backend="aot_eager")  # the graph, but no C++ compiler
    positions = far_positions(1 / 256)
    with torch.no_grad():
        expected, got, rounded = (
            model(inputs_embeds=embeddings(dtype), position_ids=where).logits
            for model, where in (
                (plain, positions), (compiled, positions), (plain, positions.bfloat16().float())
            )
        )
    print(torch.equal(got, expected), torch.equal(rounded, expected))
"""


def test_a_compiled_body_computes_the_same_from_fractional_positions() -> None:
    """In a process of its own: compilers cannot read the run-time type checker of the tests."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.stdout.splitlines() == ["True False"] * 2, done.stderr[-2000:]


def test_the_page_on_positions_computes_the_figures_it_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (ROOT / "docs" / "concepts" / "positions.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [int(line[1]) for line in lines] == [256] * 5
    counts = [int(line[2]) for line in lines]
    shares = [round(100 * float(line[3].strip("tensor()"))) for line in lines]
    text = " ".join(page.split())
    for numbers in (counts, shares):
        assert f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}" in text
