"""What packing and int8 do to a model that has learned something: its losses and its answers."""

from __future__ import annotations

import pytest
import torch
from tests.model.bodies import body_model
from torch import Tensor
from torch.nn import functional as F

from cascadevl.engine.packed_weights import pack
from cascadevl.model.modeling import CascadeVLForConditionalGeneration as Model

NUM_WORDS, LENGTH = 24, 16
FIRST = 8  # smaller ids are special tokens of the small models


def sequences(num: int, seed: int) -> Tensor:
    """Chains in which the next word follows from the last two; one word in ten is random."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(NUM_WORDS, (num, LENGTH), generator=generator)
    chance = torch.rand(num, LENGTH, generator=generator) < 0.1
    for place in range(2, LENGTH):
        follows = (words[:, place - 1] * 5 + words[:, place - 2] // 6) % NUM_WORDS
        words[:, place] = torch.where(chance[:, place], words[:, place], follows)
    return words + FIRST


def logits(model: Model, ids: Tensor) -> Tensor:
    positions = torch.arange(float(ids.shape[1])).expand(ids.shape)
    return model.decode(model.get_input_embeddings()(ids), positions).logits.float()


def loss(model: Model, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits(model, ids)[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten())


@torch.no_grad()
def answers(model: Model, prompts: Tensor, num_tokens: int = 10) -> Tensor:
    """Greedy continuations."""
    ids = prompts
    for _ in range(num_tokens):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids[:, prompts.shape[1] :]


@pytest.fixture(scope="module")
def trained() -> Model:
    """A model of 20,000 parameters that has learned the chains, in bfloat16."""
    model = body_model("qwen3", seed=2).train()
    language = [p for name, p in model.named_parameters() if "language" in name or "head" in name]
    optimiser = torch.optim.AdamW(language, lr=1e-2)
    for step in range(150):
        optimiser.zero_grad()
        loss(model, sequences(32, seed=step)).backward()
        optimiser.step()
    return model.to(torch.bfloat16).eval()


def test_losses_and_answers_stay(trained: Model):
    held_out = sequences(200, seed=10_000)
    with torch.no_grad():
        plain = float(loss(trained, held_out))
        unigram = float(torch.tensor(NUM_WORDS).log())
    assert plain < 0.6 * unigram  # it has learned something that could be lost
    expected = answers(trained, held_out[:, :4])
    bounds = {"packed": (1e-3, 0.98), "int8": (1e-2, 0.9)}
    for precision, (worse, share) in bounds.items():
        model = pack(trained, precision).model
        with torch.no_grad():
            assert abs(float(loss(model, held_out)) - plain) < worse, precision
        equal = (answers(model, held_out[:, :4]) == expected).all(1).double().mean()
        assert equal >= share, precision
