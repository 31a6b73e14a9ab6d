"""The optimiser: float32 masters, decay rules, AdamW and Muon behind one object; the schedule.

bfloat16 keeps 8 bits of a weight, so an update smaller than 1/256 of it would be lost: the
optimiser therefore owns float32 copies ("masters") of weights that are not float32, adds up the
gradients of micro-batches in float32, and writes the rounded result back after a step. The
gradient of a lone micro-batch is exact as it came and is not copied (`cascadevl.train.adamw`).
A float32 model is its own master. The state is handed out as named tensors, never as pickles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cascadevl.errors import ConfigError, TrainingError
from cascadevl.model.sharding import own_part, sum_over_parts
from cascadevl.train.adamw import PIECE, PiecewiseAdamW, Update

Module = Literal["vision", "projector", "language"]

_BETWEEN = ("multi_modal_projector.", "compressed_projector.", "model.router.")

UNDECAYED = ("cls_token", "mask_token", "position_embeddings", "query")
"""Last parts of the names of parameters with two or more axes that are not decayed all the same."""

HIDDEN_PATHS = (
    "vision_tower.encoder.",
    "multi_modal_projector.",
    "compressed_projector.",
    "language_model.layers.",
)
"""Where a matrix counts as hidden, and so is Muon's when it is the chosen optimiser."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """How weights are updated.

    Attributes:
        name: ``adamw``, or ``muon`` for the hidden matrices with AdamW for everything else.
        lr: Peak learning rate.
        muon_lr: Peak learning rate of the matrices under Muon; None takes ``lr``. Muon's update
            is scaled to the size of AdamW's, so that one value serves both.
        betas: Averaging of AdamW's two moments.
        eps: AdamW's epsilon.
        momentum: Muon's momentum.
        newton_schulz_steps: Iterations with which Muon evens out the singular values.
        weight_decay: Decoupled decay of matrices; norms, biases, layer scales, class token and
            position embeddings are never decayed.
        schedule: What follows the warm-up: cosine to ``min_lr_ratio``, constant, or constant
            with a linear fall at the end (``wsd``).
        warmup_ratio: Share of the steps in which the rate rises linearly.
        decay_ratio: Share of the steps in which ``wsd`` falls.
        min_lr_ratio: Where cosine and ``wsd`` end, as a share of the peak.
        max_grad_norm: The gradient is scaled down to this length; 0 leaves it alone.
        vision_lr_scale: Factor on the rate of the vision tower.
        projector_lr_scale: Factor on the rate of the projector.
        language_lr_scale: Factor on the rate of the language model and its head.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 8e-5  # InternVL3.5 SFT scripts; 2e-5 for 241B and for the GPT-OSS pre-training
    muon_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)  # released scripts, all stages
    eps: float = 1e-8  # released scripts, all stages
    momentum: float = 0.95  # torch.optim.Muon's own default
    newton_schulz_steps: int = 5  # torch.optim.Muon's own default
    weight_decay: float = 0.05  # released scripts, all stages
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"  # released scripts, all stages
    warmup_ratio: float = 0.03  # released scripts, all stages
    decay_ratio: float = 0.2
    min_lr_ratio: float = 0.0
    max_grad_norm: float = 1.0  # released scripts: "auto", which is 1.0
    vision_lr_scale: float = 1.0
    projector_lr_scale: float = 1.0
    language_lr_scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values that cannot train anything."""
        if not self.lr > 0 or (self.muon_lr is not None and not self.muon_lr > 0):
            raise ConfigError(
                f"optim.lr is {self.lr}, optim.muon_lr {self.muon_lr}; use positive ones"
            )
        for name in ("warmup_ratio", "decay_ratio", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"optim.{name} is {getattr(self, name)}; it is a share, 0 to 1")
        if self.max_grad_norm < 0:
            raise ConfigError(f"optim.max_grad_norm is {self.max_grad_norm}; use 0 for no clipping")


def lr_factor(step: int, num_steps: int, config: OptimConfig) -> float:
    """Share of the peak learning rate that update number ``step`` (from 0) uses.

    The first update of a warm-up of n steps uses 1/n of the peak, never 0; the first one after
    it uses the peak.
    """
    warmup = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    floor = config.min_lr_ratio
    if config.schedule == "cosine":
        progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "wsd":
        fall = max(1, math.ceil(config.decay_ratio * num_steps))
        return floor + (1 - floor) * min(1.0, max(0.0, (num_steps - step) / fall))
    return 1.0


def module_of(name: str) -> Module:
    """The part of the model that a parameter belongs to, by its name.

    All that stands between the two bodies counts as the projector, a Flash model's router too.
    """
    if "vision_tower." in name:
        return "vision"
    return "projector" if any(part in name for part in _BETWEEN) else "language"


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices and embeddings of words, to nothing else."""
    last = name.rsplit(".", 1)[-1]
    return parameter.ndim >= 2 and last not in UNDECAYED and not last.endswith("bias")


def is_muon_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes the parameter: a two-axis weight inside a block or the projector."""
    return (
        parameter.ndim == 2
        and any(path in name for path in HIDDEN_PATHS)
        and is_decayed(name, parameter)
    )


class Optimiser:
    """AdamW, alone or beside Muon, on float32 masters of a model's trainable parameters.

    A parameter without a gradient counts as one with a gradient of zero. So a step without
    pictures treats the vision tower as any number of ranks would, of which only some had none.

    Of a divided model (`cascadevl.model.sharding`) each process updates its own part, and only the
    length of the gradient is taken over all of them.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> None:
        """Build masters and groups.

        Args:
            parameters: Named parameters; frozen ones (``requires_grad`` off) are left out.
            config: The settings.

        Raises:
            ConfigError: If nothing is trainable, or Muon is to update a divided model.
        """
        self.config = config
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        if not self.parameters:
            raise ConfigError("every part of the model is frozen; leave at least one trainable")
        self.is_divided = any(isinstance(p, DTensor) for p in self.parameters.values())
        if self.is_divided and config.name == "muon":
            raise ConfigError(
                "optim.name muon orthogonalises whole matrices, of which model.shard leaves each "
                "process a part; use adamw, or leave model.shard out"
            )
        self.masters = {name: _master(p) for name, p in self.parameters.items()}
        muon = {
            name
            for name, master in self.masters.items()
            if config.name == "muon" and is_muon_matrix(name, master)
        }
        rest = [name for name in self.masters if name not in muon]
        # Gradients of a step's only micro-batch, as they came, and their factor once clipped.
        self._fresh: dict[str, Tensor] = {}
        self._scale: Tensor | None = None
        self._inner: list[PiecewiseAdamW | torch.optim.Muon] = []
        if rest:
            fused = all(self.masters[name].device.type in ("cpu", "cuda") for name in rest)
            self._inner.append(
                PiecewiseAdamW(
                    self._groups(rest, config.lr), betas=config.betas, eps=config.eps, fused=fused
                )
            )
        if muon:
            self._inner.append(
                torch.optim.Muon(
                    self._groups(sorted(muon), config.muon_lr or config.lr),
                    momentum=config.momentum,
                    ns_steps=config.newton_schulz_steps,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    def _groups(self, names: list[str], lr: float) -> list[dict[str, object]]:
        """Parameter groups of one inner optimiser, by module and by decay."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name in names:
            scale: float = getattr(self.config, f"{module_of(name)}_lr_scale")
            decay = self.config.weight_decay if is_decayed(name, self.parameters[name]) else 0.0
            groups.setdefault((lr * scale, decay), []).append(self.masters[name])
        return [
            {"params": params, "lr": peak, "peak_lr": peak, "weight_decay": decay}
            for (peak, decay), params in groups.items()
        ]

    @torch.no_grad()
    def collect(self) -> None:
        """Take the gradients of the backward pass just done from the model's weights.

        The first of a step is kept as it is; with a second one they are added up in float32.
        """
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            gradient, parameter.grad = own_part(parameter.grad), None
            if gradient.dtype == torch.float32:
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                continue
            if name in self._fresh:
                master.grad = self._fresh.pop(name).float()
            if master.grad is None:
                self._fresh[name] = gradient
            else:
                master.grad.add_(gradient)

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """The float32 gradient of every trainable parameter, in order; zeros where none came."""
        return [self._wide_gradient(name) for name in self.masters]

    def _wide_gradient(self, name: str) -> Tensor:
        """The float32 gradient of one parameter, kept from now on instead of what came."""
        master = self.masters[name]
        if name in self._fresh:
            master.grad = self._fresh.pop(name).float()
            if self._scale is not None:
                master.grad.mul_(self._scale)
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        return master.grad

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Scale the whole gradient down to ``max_grad_norm``; returns its length before that."""
        wide = [m.grad for m in self.masters.values() if m.grad is not None]
        pieces = [p for gradient in self._fresh.values() for p in gradient.flatten().split(PIECE)]
        lengths = list(torch._foreach_norm(wide)) if wide else []
        lengths += [torch.linalg.vector_norm(piece, dtype=torch.float32) for piece in pieces]
        if not lengths:
            return next(iter(self.masters.values())).new_zeros(())
        length: Tensor = torch.linalg.vector_norm(torch.stack(lengths))
        if self.is_divided:
            length = sum_over_parts(length.square(), next(iter(self.parameters.values()))).sqrt()
        if self.config.max_grad_norm:
            # As torch.nn.utils.clip_grads_with_norm_, without a pass over what is not wide yet.
            scale = (self.config.max_grad_norm / (length + 1e-6)).clamp(max=1.0)
            if wide:
                torch._foreach_mul_(wide, scale)
            self._scale = scale
        return length

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update the masters at ``factor`` times the peak rates, and the model from them."""
        names = {id(master): name for name, master in self.masters.items()}
        for inner in self._inner:
            for group in inner.param_groups:
                group["lr"] = group["peak_lr"] * factor
            owned = [names[id(p)] for group in inner.param_groups for p in group["params"]]
            if isinstance(inner, PiecewiseAdamW):
                inner.update([self._update(name) for name in owned])
            else:
                for name in owned:
                    self._wide_gradient(name)
                inner.step()
                self._publish(owned)

    def _update(self, name: str) -> Update:
        """What AdamW needs to know of one parameter."""
        master, weight = self.masters[name], self.parameters[name]
        fresh = self._fresh.get(name)
        return Update(
            master=master,
            gradient=master.grad if fresh is None else fresh,
            weight=weight.detach() if self._is_copy(name) else None,
            scale=None if fresh is None else self._scale,
        )

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self._fresh.clear()
        self._scale = None
        for name, parameter in self.parameters.items():
            parameter.grad = None
            self.masters[name].grad = None

    def _is_copy(self, name: str) -> bool:
        """Whether a master has values of its own, of which the model's are made."""
        return self.parameters[name].dtype != torch.float32

    def _publish(self, names: Iterable[str]) -> None:
        """Round the masters into the model's weights."""
        pairs = [(self.parameters[n], self.masters[n]) for n in names if self._is_copy(n)]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [master for _, master in pairs])

    def _states(self) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
        """Every master with its name and the inner optimiser that updates it."""
        owner = {
            id(p): inner
            for inner in self._inner
            for group in inner.param_groups
            for p in group["params"]
        }
        for name, master in self.masters.items():
            yield name, master, owner[id(master)]

    def state_dict(self) -> dict[str, Tensor]:
        """Masters and moments under names ``parameter.key``; all of it, and tensors only."""
        tensors: dict[str, Tensor] = {}
        for name, master, inner in self._states():
            if self._is_copy(name):
                tensors[f"{name}.master"] = master.detach()
            for key, value in inner.state.get(master, {}).items():
                tensors[f"{name}.{key}"] = value.detach()
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a state made by `state_dict`.

        Raises:
            TrainingError: If it belongs to other parameters or another optimiser.
        """
        left = dict(tensors)
        for name, master, inner in self._states():
            if self._is_copy(name):
                if f"{name}.master" not in left:
                    raise TrainingError(
                        f"the optimiser state has no float32 copy of {name}; it was "
                        "saved by a run of another precision or with other frozen parts"
                    )
                master.copy_(left.pop(f"{name}.master"))
            keys = {"momentum_buffer"} if isinstance(inner, torch.optim.Muon) else _ADAMW_KEYS
            found = {key: left.pop(f"{name}.{key}") for key in keys if f"{name}.{key}" in left}
            if found and set(found) != keys:
                raise TrainingError(f"the optimiser state of {name} has {sorted(found)} only")
            for key, value in found.items():
                inner.state[master][key] = value.to(master.device, copy=True)
        if left:
            raise TrainingError(
                f"the optimiser state holds {len(left)} tensors of no trainable parameter, the "
                f"first is {min(left)}; resume with the model, freezing and optimiser it was "
                "saved with"
            )
        self._publish(self.parameters)


_ADAMW_KEYS = {"step", "exp_avg", "exp_avg_sq"}


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """The float32 copy that the optimiser updates; the parameter itself if it is float32.

    Of a divided parameter, this process's part of it, in the same memory.
    """
    if isinstance(parameter, DTensor):
        return nn.Parameter(own_part(parameter.detach()))
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().to(torch.float32, copy=True))


def set_precision(model: nn.Module, precision: Literal["float32", "bfloat16"]) -> None:
    """Cast a model's parameters, and its parameters only.

    ``Module.to`` would also round buffers, among them the rotary frequencies, with which
    fractional positions are computed in float32.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
