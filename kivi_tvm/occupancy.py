"""How many work-groups of a CUDA kernel a multiprocessor holds at once.

Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; rounding as
in the CUDA toolkit's `cuda_occupancy.h`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from kivi_tvm.cuda import base_architecture, number_of

WARP = 32
REGISTERS = 65536  # of a multiprocessor, on all architectures below
PARTITIONS = 4  # of a multiprocessor, each with its share of registers and warps
REGISTER_UNIT = 256  # registers are given to warps in multiples of this


@dataclass(frozen=True, slots=True)
class Limits:
    """What a multiprocessor has for work-groups.

    Parameters
    ----------
    warps, groups : int
        That it can hold.
    shared_bytes : int
    system_bytes : int
        Of shared memory, that the system keeps for itself of every work-group's.
    unit_bytes : int
        Shared memory is given in multiples of this.
    """

    warps: int
    groups: int
    shared_bytes: int
    system_bytes: int = 1024
    unit_bytes: int = 128


LIMITS = {
    "sm_75": Limits(32, 16, 64 << 10, system_bytes=0, unit_bytes=256),
    "sm_80": Limits(64, 32, 164 << 10),
    "sm_86": Limits(48, 16, 100 << 10),
    "sm_89": Limits(48, 24, 100 << 10),
    "sm_90": Limits(64, 32, 228 << 10),
    "sm_100": Limits(64, 32, 228 << 10),
    "sm_120": Limits(48, 24, 100 << 10),
}


def group_bytes(architecture: str) -> int | None:
    """Shared memory that one work-group may have; None if unknown.

    Of an architecture that is not listed, that of the one before it of the same major version:
    code for that one runs on it.
    """
    number = number_of(architecture)
    known = {number_of(name): limits for name, limits in LIMITS.items()}
    before = [n for n in known if n <= number and n // 10 == number // 10]
    if not before:
        return None
    limits = known[max(before)]
    return limits.shared_bytes - limits.system_bytes


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Work-groups and warps that a multiprocessor holds at once, and what limits their number."""

    groups: int
    warps: int
    max_warps: int
    limit: str

    def to_dict(self) -> dict[str, int | str]:
        return asdict(self)


def occupancy(
    architecture: str, threads: int, registers: int, shared_bytes: int
) -> Occupancy | None:
    """Occupancy of a kernel; None if the architecture's limits or its work-groups are unknown.

    Parameters
    ----------
    architecture : str
        Such as "sm_90" or "sm_90a".
    threads : int
        Of a work-group.
    registers : int
        Of a thread.
    shared_bytes : int
        Of a work-group, without what the system keeps.
    """
    limits = LIMITS.get(base_architecture(architecture))
    if limits is None or threads < 1:
        return None
    warps = -(-threads // WARP)
    of_a_warp = _up(max(registers, 1) * WARP, REGISTER_UNIT)
    shared = _up(shared_bytes + limits.system_bytes, limits.unit_bytes)
    groups = {
        "warps": limits.warps // warps,
        "work-groups": limits.groups,
        "registers": REGISTERS // PARTITIONS // of_a_warp * PARTITIONS // warps,
        "shared memory": limits.shared_bytes // shared if shared else limits.groups,
    }
    limit = min(groups, key=lambda name: groups[name])
    return Occupancy(groups[limit], groups[limit] * warps, limits.warps, limit)


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
