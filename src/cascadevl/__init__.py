"""cascadevl: train, align, compress, run and measure InternVL3 and InternVL3.5 models.

``model, processor = cascadevl.load("path/or/name")`` opens every released format. Names load
on first use, so that ``import cascadevl`` itself is quick and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from cascadevl.version import __version__

if TYPE_CHECKING:
    from cascadevl.data.processor import CascadeVLProcessor
    from cascadevl.model.configuration import CascadeVLConfig
    from cascadevl.model.loading import load
    from cascadevl.model.modeling import CascadeVLForConditionalGeneration

_HOMES = {
    "load": "cascadevl.model.loading",
    "CascadeVLForConditionalGeneration": "cascadevl.model.modeling",
    "CascadeVLConfig": "cascadevl.model.configuration",
    "CascadeVLProcessor": "cascadevl.data.processor",
}

__all__ = [
    "CascadeVLConfig",
    "CascadeVLForConditionalGeneration",
    "CascadeVLProcessor",
    "__version__",
    "load",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'cascadevl' has no attribute {name!r}")
