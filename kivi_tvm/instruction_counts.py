"""What the instructions of CUDA machine code do, counted.

Opcodes: NVIDIA's "CUDA Binary Utilities", instruction set reference.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kivi_tvm.control_flow import Instruction

WIDE_BITS = 128  # of one access of a lane; a warp's then fill 4 whole cache lines

GLOBAL_LOADS = {"LDG", "LDGSTS", "LD"}
# Float to float: packs of two halves, and additions that read halves and give float32.
KINDS = {
    "shared_loads": {"LDS", "LDSM"},
    "int_to_float": {"I2F", "I2FP", "UI2F", "UI2FP"},
    "float_to_int": {"F2I", "F2IP", "UF2I", "UF2IP"},
    "float_to_float": {"F2F", "F2FP", "UF2F", "UF2FP"},
    "logic": {"LOP", "LOP3", "SHF", "SHL", "SHR", "ULOP3", "USHF", "USHL", "USHR"},
    "integer": {
        *("IADD", "IADD3", "IADD32I", "UIADD3", "VIADD", "UVIADD", "IMAD", "UIMAD", "IMUL", "IDP"),
        *(
            "LEA",
            "ULEA",
            "PRMT",
            "UPRMT",
            "IABS",
            "SGXT",
            "USGXT",
            "BMSK",
            "UBMSK",
            "BREV",
            "UBREV",
        ),
        *("IMNMX", "UIMNMX", "VIMNMX", "UVIMNMX", "VIMNMX3", "VIADDMNMX", "ISETP", "UISETP"),
        *("POPC", "UPOPC", "FLO", "UFLO", "UBREV"),
    },
}


@dataclass(frozen=True, slots=True)
class Counts:
    """Instructions of a stretch of code, by what they do.

    Parameters
    ----------
    global_loads : mapping of int to int
        Number of loads from global memory, by the bits that one lane loads.
    kinds : mapping of str to int
        Number of the others, by `KINDS`, "mma" (of tensor cores) and "other".
    """

    global_loads: Mapping[int, int]
    kinds: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.global_loads.values()) + sum(self.kinds.values())

    @property
    def global_load_bytes(self) -> int:
        """Bytes that a lane loads if it runs every instruction once."""
        return sum(bits // 8 * count for bits, count in self.global_loads.items())

    @property
    def wide_load_bytes(self) -> int:
        """Those of accesses of 16 bytes and more."""
        wide = {bits: count for bits, count in self.global_loads.items() if bits >= WIDE_BITS}
        return sum(bits // 8 * count for bits, count in wide.items())

    def __getitem__(self, kind: str) -> int:
        return self.kinds.get(kind, 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; loads of 32 bits and less are one number."""
        loads = {"32": 0, "64": 0, "128": 0}
        for bits, count in self.global_loads.items():
            name = str(max(bits, 32))
            loads[name] = loads.get(name, 0) + count
        names = [
            "shared_loads",
            "mma",
            *[each for each in KINDS if each != "shared_loads"],
            "other",
        ]
        return {"global_loads": loads, **{each: self[each] for each in names}, "total": self.total}


def access_bits(name: str) -> int:
    """Bits that one lane's access of memory moves: 128 of "LDG.E.128", 32 where nothing is said."""
    widths = re.findall(r"\.(?:[USB](8|16)|(64|128|256))(?=\.|$)", name)
    return int("".join(widths[-1])) if widths else 32


def kind_of(name: str) -> str:
    """What an instruction other than a load from global memory does."""
    stem = name.partition(".")[0]
    if stem.endswith("MMA"):
        return "mma"
    if name.startswith(("HADD2.F32", "HADD2.BF16_V2.F32")):
        return "float_to_float"
    if name.startswith("IMAD.MOV"):  # a move by another unit
        return "other"
    return next((kind for kind, stems in KINDS.items() if stem in stems), "other")


def count(instructions: Iterable[Instruction]) -> Counts:
    """Instructions by what they do, without the fillers behind a kernel's end."""
    loads: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    for each in instructions:
        if each.name == "NOP":
            continue
        if each.name.partition(".")[0] in GLOBAL_LOADS:
            loads[access_bits(each.name)] += 1
        else:
            kinds[kind_of(each.name)] += 1
    return Counts(dict(loads), dict(kinds))
