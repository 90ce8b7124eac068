"""What measures candidates: this machine, a tracker's devices, or a batch job elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from kivi_tvm.tune.candidate import Built, Measured


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What candidates run on; a GPU has no `threads`."""

    name: str
    kind: str  # "cpu" or "cuda"
    threads: int


class Runner(Protocol):
    """Checks and times built candidates; a candidate's fault never raises.

    Attributes
    ----------
    device : DeviceInfo
    method : str
        "local", "rpc" or "detached".
    """

    device: DeviceInfo
    method: str

    in_turn: bool  # one device: candidates are better timed in turn than one after the other

    def measure(self, built: Sequence[Built]) -> list[Measured]:
        """Check each candidate against the reference, then time it; the order is kept."""
        ...

    def compare(self, built: Sequence[Built], rounds: int) -> list[Measured]:
        """Time candidates of one task in turn, so that a busy machine slows all of them alike."""
        ...

    def read_gb_per_s(self) -> float:
        """Rate at which the device reads its memory, measured now."""
        ...

    def close(self) -> None:
        """Let go of processes and files."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...
