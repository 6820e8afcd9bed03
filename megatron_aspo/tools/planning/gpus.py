"""Data sheets of the GPUs that the planner supports."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A data-centre GPU.

    Attributes:
        memory: free bytes that the driver reports, of the nominal 80, 80, 141 and 192 GB.
        flops: dense bfloat16 operations per second, from the data sheet.
        bandwidth: bytes per second of its memory, from the data sheet.
        capability: CUDA's compute capability, which determines its FP8 recipes.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    capability: tuple[int, int]

    @property
    def usable(self) -> int:
        """Bytes that a plan may fill; the other 3 % are a margin, because some of its parts are assumed."""
        return int(0.97 * self.memory)


KNOWN = {
    "a100": Gpu("A100-80GB", int(79.1 * GIB), 312e12, 2.0e12, (8, 0)),
    "h100": Gpu("H100-80GB", int(79.1 * GIB), 989e12, 3.35e12, (9, 0)),
    "h200": Gpu("H200", int(139.8 * GIB), 989e12, 4.8e12, (9, 0)),
    "b200": Gpu("B200", int(178.0 * GIB), 2250e12, 7.7e12, (10, 0)),
}
