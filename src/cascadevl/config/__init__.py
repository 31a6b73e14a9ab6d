"""YAML files and dotted overrides become frozen dataclasses, and back.

Every part of the package keeps its settings in a frozen dataclass beside the code that reads
them; a run is one such dataclass of dataclasses, filled by `load_config` from YAML files,
composed left to right, and from overrides such as ``optim.lr=5e-6``. A file may name another
under ``base``, of which it changes single keys.
"""

from __future__ import annotations

from cascadevl.config.building import config_keys, dump_config, load_config

__all__ = ["config_keys", "dump_config", "load_config"]
