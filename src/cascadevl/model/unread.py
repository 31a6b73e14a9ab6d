"""Weights that stay in their files until they are wanted: large models, filled part by part.

A process that is to keep a part of a model need not hold the whole for that. The model is built
without values, brought into its shape, and each layer is filled just before it is divided
(`cascadevl.model.sharding`). Whoever needs all values first calls `fill`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

_UNREAD = "unread_weights"


def leave_unread(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Note where the values of a model's parameters are, which are on the meta device.

    Args:
        model: The model.
        read: Gives the values of a parameter by its name.
    """
    setattr(model, _UNREAD, read)


def fill(model: nn.Module, part: nn.Module | None = None) -> None:
    """Give parameters the values that were left in files; those that have values keep them.

    Args:
        model: The model.
        part: Of which the parameters are filled; all of the model's if None.
    """
    read: Callable[[str], Tensor] | None = getattr(model, _UNREAD, None)
    if read is None:
        return
    wanted = {id(p) for p in (part or model).parameters() if p.is_meta}
    filled = {
        id(empty): nn.Parameter(read(name), requires_grad=empty.requires_grad)
        for name, empty in model.named_parameters()
        if id(empty) in wanted
    }
    for module in model.modules():  # a tied weight stands in two of them
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in filled:
                module._parameters[name] = filled[id(parameter)]
