"""One model divided among processes (FSDP2): each holds a part of every weight.

Layer by layer the weights are put together where they are needed, and their gradients divided
again, summed in float32 (`torch.distributed.fsdp.fully_shard`). So processes must call the model
equally often, and reach the same weights in each call; they agree on that before each. What is
summed is not divided by the number of processes, because losses are normalised over the whole step
already (docs/decisions/0002, docs/decisions/0052).
"""

from __future__ import annotations

import os
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cascadevl.errors import ConfigError
from cascadevl.model.adapters import first_values, forget_fingerprint, note_fingerprint
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.unread import fill
from cascadevl.types import NO_PARENT, Batch

Sharding: TypeAlias = Literal["full", "hybrid"]
"""Over all processes; or over those of a host, with a copy on each host."""

_SHARD, _COPIES = "shard", "replicate"
_LOCKSTEP = "lockstep"


def shard(
    model: CascadeVLForConditionalGeneration,
    how: Sharding,
    device: torch.device,
    *,
    dtype: torch.dtype,
) -> None:
    """Divide a model among the processes of a run, in place.

    What is trained is kept in float32, divided, so that an optimiser needs no copy of it; layers
    compute with it in ``dtype``. Buffers are whole on every process, as they were.

    Args:
        model: The model, the same on every process, whole or left in its files, parts frozen that
            stay as they are.
        how: Over which processes.
        device: Where this process computes.
        dtype: In which layers compute, and in which frozen weights are kept.

    Raises:
        ConfigError: If there is one process, or hosts have different numbers of them.
    """
    mesh = _mesh(how, device)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # it would round positions, which are float32
    )
    values: dict[str, bytes] = {}
    layers = (*model.model.vision_tower.encoder.layer, *model.model.language_model.layers)
    for unit in (*layers, model):
        fill(model, unit)
        undivided = {id(p) for p in unit.parameters() if not isinstance(p, DTensor)}
        mine = [(name, p) for name, p in model.named_parameters() if id(p) in undivided]
        values |= first_values(mine)
        for _, parameter in mine:
            kept = torch.float32 if parameter.requires_grad else dtype
            parameter.data = parameter.data.to(kept)
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    note_fingerprint(model, values)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    setattr(model, _LOCKSTEP, _Lockstep(model, device))


def is_divided(model: nn.Module) -> bool:
    """Whether processes share a model."""
    return hasattr(model, _LOCKSTEP)


def wait_for_others(model: nn.Module) -> None:
    """Take part in other processes' calls of a divided model, until none has any more to make.

    For passes without gradients over data of which each process has a share.

    Args:
        model: The model; of one that is not divided nobody waits for anybody.
    """
    if is_divided(model):
        getattr(model, _LOCKSTEP).wait_for_others()


def _mesh(how: Sharding, device: torch.device) -> DeviceMesh:
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes == 1:
        raise ConfigError(
            f"model.shard {how} divides the model among processes, and there is one; start more "
            "(torchrun --nproc-per-node 8 -m cascadevl train ...), or leave model.shard out"
        )
    if how == "full":
        return init_device_mesh(device.type, (processes,), mesh_dim_names=(_SHARD,))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    hosts, rest = divmod(processes, local)
    if rest:
        raise ConfigError(
            f"model.shard hybrid needs as many processes on every host, and {processes} are not a "
            f"multiple of the {local} of this one; use model.shard full"
        )
    return init_device_mesh(device.type, (hosts, local), mesh_dim_names=(_COPIES, _SHARD))


class _Lockstep:
    """Keeps processes together that share a model.

    Before every call they agree whether any of them has tiles: if so, those without look at an
    empty one, which changes nothing, because the vision tower is put together by all or by none.
    """

    def __init__(self, model: CascadeVLForConditionalGeneration, device: torch.device) -> None:
        """Watch the calls of a model.

        Args:
            model: The divided model.
            device: Where this process computes.
        """
        self._model, self._device, self._is_idle = model, device, False
        model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        del module, args
        batch = kwargs.get("batch")
        if batch is None:
            raise ValueError("a divided model takes packed batches only; export it to ask it")
        if not self._is_idle:
            looks = batch.tiles is not None and kwargs.get("features") is None
            _, self._model.model.looks_along = self._agree(works=True, looks=looks)

    def _agree(self, *, works: bool, looks: bool) -> tuple[bool, bool]:
        """Whether any process has a batch, and whether any has tiles."""
        said = torch.tensor([works, looks], dtype=torch.int32, device=self._device)
        dist.all_reduce(said)
        any_works, any_looks = said.tolist()
        return any_works > 0, any_looks > 0

    @torch.no_grad()
    def wait_for_others(self) -> None:
        """Take part in the calls of processes that have more of them, until none has any."""
        while True:
            works, looks = self._agree(works=False, looks=False)
            if not works:
                break
            self._model.model.looks_along = looks
            self._is_idle = True
            self._model(batch=_nothing(self._device), head_fn=lambda logits, _: logits[:, 0])
            self._is_idle = False
        reshard(self._model)


def _nothing(device: torch.device) -> Batch:
    """A batch of one token that nobody wants to know anything of."""
    one = torch.zeros(1, 1, dtype=torch.int64, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return Batch(
        input_ids=one,
        position_ids=one.float(),
        segments=one,
        parents=torch.full_like(one, NO_PARENT),
        tiles=None,
        tokens_per_tile=none,
        visual_index=none,
        target_index=one[0],
        target_ids=one[0],
        target_weights=one[0].float(),
        target_samples=one[0],
        sources=("nothing",),
    )


def reshard(model: nn.Module) -> None:
    """Leave each process its own part alone; what was put together for a call is freed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def put_together(model: nn.Module, *, is_main: bool, dtype: torch.dtype) -> None:
    """Make the main process's model whole again, in the host's memory; nobody can call it then.

    All processes take part. The others are left with weights that have no values.

    Args:
        model: A divided model; another one is left as it is.
        is_main: Whether this is the main process.
        dtype: Of the whole weights.
    """
    reshard(model)
    forget_fingerprint(model)
    made: dict[int, tuple[DTensor, nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in made:
                full = whole(parameter)
                kept = full.to("cpu", dtype) if is_main else full.to("meta")
                new = nn.Parameter(kept, requires_grad=parameter.requires_grad)
                made[id(parameter)] = parameter, new
            module._parameters[name] = made[id(parameter)][1]


def whole(tensor: Tensor) -> Tensor:
    """All of a divided tensor, for which all its processes ask together; another one as it is."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a divided tensor, in the same memory; another one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> tuple[int, int] | None:
    """First row of this process's part of a divided tensor and the one behind its last; or None."""
    if not isinstance(tensor, DTensor):
        return None
    mesh = tensor.device_mesh
    rows = tensor.shape[0]
    share = -(-rows // mesh[_SHARD].size())  # as torch.chunk divides
    first = min(share * mesh.get_local_rank(_SHARD), rows)
    last = min(first + share, rows)
    assert len(tensor.to_local()) == last - first, "torch divides in another way than expected"
    return first, last


def is_written_here(tensor: Tensor) -> bool:
    """Whether this process is the one that writes its part: of equal copies the first."""
    if not isinstance(tensor, DTensor):
        return True
    names = tensor.device_mesh.mesh_dim_names or ()
    return _COPIES not in names or tensor.device_mesh.get_local_rank(_COPIES) == 0


def sum_over_parts(value: Tensor, like: Tensor) -> Tensor:
    """A number of every part of a divided tensor, added up; of a whole one the number itself."""
    if isinstance(like, DTensor):
        value = value.clone()
        dist.all_reduce(value, group=like.device_mesh.get_group(_SHARD))
    return value
