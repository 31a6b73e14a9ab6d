"""The weights of a model that answers: its mode while it does, and new ones in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from cascadevl.errors import CheckpointError
from cascadevl.model.checkpoint import HEAD
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.sharding import whole


@contextmanager
def evaluating(model: CascadeVLForConditionalGeneration) -> Iterator[None]:
    """Evaluation mode inside, the mode it had afterwards."""
    was_training = model.training
    if was_training:
        model.train(False)
    try:
        yield
    finally:
        if was_training:
            model.train(True)


def load_weights(model: CascadeVLForConditionalGeneration, state: Mapping[str, Tensor]) -> None:
    """Copy new weights into a model, in place.

    Args:
        model: Whose parameters and saved buffers are overwritten.
        state: Tensors by the names of its ``state_dict``; a tied head may be absent. Those of a
            divided model are put together one after the other, on all its processes.

    Raises:
        CheckpointError: If names or shapes differ from the model's; then nothing has changed.
    """
    own = model.state_dict()
    if model.config.tie_word_embeddings and HEAD not in state:
        del own[HEAD]
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise CheckpointError(
            f"the new weights lack {len(missing)} of the model's {len(own)} tensors and have "
            f"{len(unknown)} it does not know, such as {(missing or unknown)[0]!r}; give the "
            f"state of a model of the same configuration"
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise CheckpointError(
                f"{name} is {tuple(tensor.shape)} in the model but {tuple(state[name].shape)} in "
                f"the new weights; give the state of a model of the same configuration"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(whole(state[name]))
