from __future__ import annotations

import math

import pytest
import torch
from tests.reference import adamw_by_hand
from torch import nn

from cascadevl.errors import ConfigError, TrainingError
from cascadevl.train import adamw
from cascadevl.train.optim import (
    OptimConfig,
    Optimiser,
    is_decayed,
    is_muon_matrix,
    lr_factor,
    module_of,
    set_precision,
)


class Toy(nn.Module):
    """One matrix and one bias under names of the real model."""

    def __init__(self, rows: int = 2, columns: int = 3) -> None:
        super().__init__()
        self.multi_modal_projector = nn.Linear(columns, rows)


def optimiser(model: nn.Module, **settings: object) -> Optimiser:
    return Optimiser(model.named_parameters(), OptimConfig(**settings))  # type: ignore[arg-type]


def give(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


# ---- the schedule


def test_warmup_rises_from_one_share_to_the_peak_and_cosine_falls_by_hand() -> None:
    config = OptimConfig(warmup_ratio=0.2, schedule="cosine")
    factors = [lr_factor(step, 10, config) for step in range(10)]
    half = [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert factors == pytest.approx([0.5, 1.0, *half])
    assert factors[6] == pytest.approx(0.5)  # half way through the fall
    assert factors[-1] > 0


def test_cosine_ends_at_the_floor() -> None:
    config = OptimConfig(warmup_ratio=0.0, min_lr_ratio=0.1)
    assert lr_factor(100, 100, config) == pytest.approx(0.1)
    assert lr_factor(50, 100, config) == pytest.approx(0.55)


def test_wsd_is_flat_then_falls_linearly() -> None:
    config = OptimConfig(schedule="wsd", warmup_ratio=0.1, decay_ratio=0.4)
    factors = [lr_factor(step, 10, config) for step in range(10)]
    assert factors == pytest.approx([1.0] * 7 + [0.75, 0.5, 0.25])


def test_constant_stays_at_the_peak_and_a_rounded_warmup_is_not_lost() -> None:
    config = OptimConfig(schedule="constant", warmup_ratio=0.03)
    assert [lr_factor(step, 100, config) for step in (0, 1, 2, 3, 99)] == pytest.approx(
        [1 / 3, 2 / 3, 1.0, 1.0, 1.0]
    )


@pytest.mark.parametrize(
    "settings", [{"lr": 0.0}, {"warmup_ratio": 1.5}, {"max_grad_norm": -1.0}, {"muon_lr": -1.0}]
)
def test_useless_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        OptimConfig(**settings)  # type: ignore[arg-type]


# ---- AdamW


def test_adamw_equals_the_algorithm_by_hand_with_decay_on_the_matrix_only() -> None:
    model = Toy()
    start = [p.detach().double().clone() for p in model.parameters()]
    opt = optimiser(model, lr=0.1, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-6)
    gradients, factors = [0.5, -2.0, 0.25], [0.5, 1.0, 0.75]
    for gradient, factor in zip(gradients, factors, strict=True):
        give(model, gradient)
        opt.step(factor)
        opt.zero_grad()
    lrs = [0.1 * factor for factor in factors]
    for parameter, before, decay in zip(model.parameters(), start, (0.3, 0.0), strict=True):
        expected = [
            adamw_by_hand.weights_after(w, gradients, lrs, betas=(0.8, 0.9), eps=1e-6, decay=decay)
            for w in before.flatten().tolist()
        ]
        assert parameter.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_module_scales_reach_their_module() -> None:
    model = nn.ModuleDict(
        {name: nn.Linear(2, 2, bias=False) for name in ("vision_tower", "language_model")}
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = optimiser(model, lr=0.1, weight_decay=0.0, vision_lr_scale=0.25)
    give(model, 1.0)
    opt.step(1.0)
    moved = {n: (before[n] - p).detach().mean().item() for n, p in model.named_parameters()}
    assert moved["vision_tower.weight"] == pytest.approx(0.025, rel=1e-4)
    assert moved["language_model.weight"] == pytest.approx(0.1, rel=1e-4)


def test_a_gradient_that_did_not_come_is_zero_and_momentum_moves_on() -> None:
    torch.manual_seed(0)
    with_none, with_zero = Toy(), Toy()
    with_zero.load_state_dict(with_none.state_dict())
    opts = [optimiser(m, lr=0.1) for m in (with_none, with_zero)]
    for model, opt in zip((with_none, with_zero), opts, strict=True):
        give(model, 1.0)
        opt.step(1.0)
        opt.zero_grad()
    before = with_none.multi_modal_projector.weight.detach().clone()
    give(with_zero, 0.0)
    for opt in opts:
        opt.step(1.0)
    assert torch.equal(
        with_none.multi_modal_projector.weight, with_zero.multi_modal_projector.weight
    )
    assert not torch.equal(before, with_none.multi_modal_projector.weight)


def test_clip_scales_the_whole_gradient_to_the_limit_and_tells_the_length() -> None:
    model = Toy()
    opt = optimiser(model, max_grad_norm=1.0)
    give(model, 2.0)  # 6 + 2 entries of 2: length sqrt(32)
    assert opt.clip().item() == pytest.approx(math.sqrt(32))
    assert math.hypot(*(g for t in opt.gradients() for g in t.flatten().tolist())) == (
        pytest.approx(1.0, rel=1e-5)
    )
    give(model, 0.01)
    opt.clip()
    assert model.multi_modal_projector.bias.grad is not None
    assert model.multi_modal_projector.bias.grad.tolist() == pytest.approx([0.01, 0.01])


def test_frozen_parts_are_left_alone_and_all_frozen_is_refused() -> None:
    model = Toy()
    model.multi_modal_projector.bias.requires_grad_(False)
    opt = optimiser(model)
    assert list(opt.parameters) == ["multi_modal_projector.weight"]
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen"):
        optimiser(model)


# ---- masters


def test_updates_too_small_for_bfloat16_add_up_in_the_masters() -> None:
    model = Toy()
    nn.init.ones_(model.multi_modal_projector.weight)
    set_precision(model, "bfloat16")
    opt = optimiser(model, lr=1e-4, weight_decay=0.0, schedule="constant")
    for _ in range(100):  # each update is 1e-4, half of bfloat16's spacing below 1 is 2e-3
        give(model, 1.0)
        opt.collect()
        opt.step(1.0)
        opt.zero_grad()
    assert model.multi_modal_projector.weight.dtype == torch.bfloat16
    assert model.multi_modal_projector.weight.tolist() == [[0.98828125] * 3] * 2  # nearest to .99
    master = opt.masters["multi_modal_projector.weight"]
    assert master.flatten().tolist() == pytest.approx([0.99] * 6, abs=1e-5)


def test_micro_batches_are_collected_in_float32() -> None:
    model = Toy()
    set_precision(model, "bfloat16")
    opt = optimiser(model)
    for value in (1.0, 2**-10, 2**-10):  # bfloat16 would round the sum back to 1
        give(model, value)
        opt.collect()
    assert all((g == 1 + 2**-9).all() for g in opt.gradients())
    assert model.multi_modal_projector.weight.grad is None


def test_precision_leaves_buffers_alone() -> None:
    model = Toy()
    model.register_buffer("inv_freq", torch.tensor([1.0, 1 / 3]))
    set_precision(model, "bfloat16")
    assert model.get_buffer("inv_freq").dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_pieces_of_bfloat16_gradients_equal_torch_on_float32_ones(
    max_grad_norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw, "PIECE", 32)
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(13, 7), "b": nn.Linear(3, 2), "c": nn.Linear(40, 9)})
    model["a"].weight = nn.Parameter(model["a"].weight.detach().T.contiguous().T)
    set_precision(model, "bfloat16")
    opt = optimiser(model, lr=0.1, weight_decay=0.1, max_grad_norm=max_grad_norm)
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    groups = [
        {"params": [m for m in masters if (m.ndim == 2) == decayed], "weight_decay": decay}
        for decayed, decay in ((True, 0.1), (False, 0.0))
    ]
    reference = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(3):
        for parameter, master in zip(model.parameters(), masters, strict=True):
            parameter.grad = torch.randn_like(parameter)
            master.grad = parameter.grad.float()
        opt.collect()
        length = opt.clip()
        expected = torch.nn.utils.get_total_norm([m.grad for m in masters])
        torch.testing.assert_close(length, expected)
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(masters, max_grad_norm)
        opt.step(1.0)
        opt.zero_grad()
        reference.step()
    for mine, parameter, theirs in zip(
        opt.masters.values(), model.parameters(), masters, strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
        assert torch.equal(parameter, mine.bfloat16())


def test_gradients_read_after_clipping_are_clipped() -> None:
    model = Toy()
    set_precision(model, "bfloat16")
    opt = optimiser(model, max_grad_norm=1.0)
    give(model, 2.0)
    opt.collect()
    assert opt.clip().item() == pytest.approx(math.sqrt(32))
    assert all(g.dtype == torch.float32 for g in opt.gradients())
    assert math.hypot(*(g for t in opt.gradients() for g in t.flatten().tolist())) == (
        pytest.approx(1.0, rel=1e-5)
    )


# ---- Muon


def test_muon_update_has_near_equal_singular_values_of_the_size_of_adamw() -> None:
    torch.manual_seed(1)
    model = Toy(rows=12, columns=20)
    weight = model.multi_modal_projector.weight
    before = weight.detach().clone()
    opt = optimiser(model, name="muon", lr=0.01, weight_decay=0.0)
    weight.grad = torch.randn_like(weight) * 7.0
    model.multi_modal_projector.bias.grad = torch.ones(12)
    opt.step(0.5)
    update = (before - weight).detach() / (0.5 * 0.01 * 0.2 * math.sqrt(20))
    singular = torch.linalg.svdvals(update)
    assert 0.6 < singular.min() < singular.max() < 1.3


def test_muon_takes_hidden_matrices_only() -> None:
    matrix, vector, stack = torch.zeros(2, 2), torch.zeros(2), torch.zeros(3, 2, 2)
    body = "model.language_model.layers.0.mlp.down_proj.weight"
    assert is_muon_matrix(body, matrix)
    assert is_muon_matrix("model.vision_tower.encoder.layer.1.attention.q_proj.weight", matrix)
    assert is_muon_matrix("model.multi_modal_projector.linear_1.weight", matrix)
    assert not is_muon_matrix("model.language_model.embed_tokens.weight", matrix)
    assert not is_muon_matrix("lm_head.weight", matrix)
    assert not is_muon_matrix("model.language_model.layers.0.input_layernorm.weight", vector)
    assert not is_muon_matrix("model.language_model.layers.0.mlp.experts.gate_up_proj", stack)
    assert not is_muon_matrix("model.language_model.layers.0.mlp.experts.down_proj_bias", matrix)


# ---- names


def test_names_decide_module_and_decay() -> None:
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    tower = "model.vision_tower.embeddings."
    assert module_of(tower + "cls_token") == "vision"
    assert module_of("model.multi_modal_projector.linear_1.weight") == "projector"
    assert module_of("lm_head.weight") == module_of("model.language_model.norm.weight")
    assert module_of("lm_head.weight") == "language"
    assert is_decayed("model.language_model.embed_tokens.weight", matrix)
    assert not is_decayed(tower + "cls_token", torch.zeros(1, 1, 2))
    assert not is_decayed(tower + "position_embeddings", torch.zeros(1, 5, 2))
    assert not is_decayed("model.vision_tower.encoder.layer.0.lambda_1", vector)


# ---- state


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_state_taken_over_goes_on_bit_for_bit(name: str, precision: str) -> None:
    torch.manual_seed(0)
    model, other = Toy(), Toy()
    for m in (model, other):
        set_precision(m, precision)  # type: ignore[arg-type]
    opt, copy = optimiser(model, name=name, lr=0.1), optimiser(other, name=name, lr=0.1)
    for value in (1.0, -0.5):
        give(model, value)
        opt.collect()
        opt.step(1.0)
        opt.zero_grad()
    other.load_state_dict(model.state_dict())
    copy.load_state_dict({key: value.clone() for key, value in opt.state_dict().items()})
    for m, o in ((model, opt), (other, copy)):
        give(m, 0.25)
        o.collect()
        o.step(0.3)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for key, value in opt.state_dict().items():
        assert torch.equal(value, copy.state_dict()[key])


def test_state_of_another_optimiser_or_model_is_refused_by_name() -> None:
    model = Toy()
    adamw, muon = optimiser(model, name="adamw"), optimiser(model, name="muon")
    give(model, 1.0)
    adamw.step(1.0)
    with pytest.raises(TrainingError, match=r"multi_modal_projector\.weight\.exp_avg"):
        muon.load_state_dict(adamw.state_dict())
    half = Toy()
    set_precision(half, "bfloat16")
    with pytest.raises(TrainingError, match="float32 copy"):
        optimiser(half).load_state_dict(adamw.state_dict())
