"""What a processor can do at most: a GPU by its maker's data sheet, a CPU as it was measured."""

from __future__ import annotations

from dataclasses import dataclass

from cascadevl.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One processor: a GPU, or a core.

    Attributes:
        name: For tables.
        flops_per_s: Operations of dense BF16 matrix products in a second, at most.
        bytes_per_s: Bytes of its memory that it reads in a second, at most.
        memory_bytes: Bytes of that memory.
        source: Where the figures are from.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    memory_bytes: float
    source: str

    def __post_init__(self) -> None:
        """Refuse what no processor is.

        Raises:
            ConfigError: If a figure is not positive.
        """
        for name in ("flops_per_s", "bytes_per_s", "memory_bytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")


HARDWARE = {
    "a100": Hardware(
        name="A100 80 GB",
        flops_per_s=312e12,
        bytes_per_s=2.039e12,
        memory_bytes=80e9,
        source="NVIDIA, A100 SXM data sheet",
    ),
    "h100": Hardware(
        name="H100 80 GB",
        flops_per_s=989e12,
        bytes_per_s=3.35e12,
        memory_bytes=80e9,
        source="NVIDIA, H100 SXM data sheet, without sparsity",
    ),
    "h200": Hardware(
        name="H200 141 GB",
        flops_per_s=989e12,
        bytes_per_s=4.8e12,
        memory_bytes=141e9,
        source="NVIDIA, H200 SXM data sheet, without sparsity",
    ),
}


def measured_core(flops_per_s: float, bytes_per_s: float, memory_bytes: float) -> Hardware:
    """A core of a CPU, as somebody measured it.

    Args:
        flops_per_s: A large BF16 product on one core.
        bytes_per_s: Reading a large matrix with one core.
        memory_bytes: Memory that a core may fill.

    Raises:
        ConfigError: If a figure is not positive.
    """
    return Hardware(
        name="CPU core",
        flops_per_s=flops_per_s,
        bytes_per_s=bytes_per_s,
        memory_bytes=memory_bytes,
        source="measured",
    )
