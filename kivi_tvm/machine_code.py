"""What machine code of CUDA kernels consists of, read from the text that CUDA's tools print.

Pure functions over text: the tools themselves are run by `cuda_tools`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from kivi_tvm.control_flow import Instruction, innermost_loops
from kivi_tvm.cuda import asked_bytes
from kivi_tvm.instruction_counts import Counts, access_bits, count

# On these architectures the tools count 1 kB that the system keeps of every work-group's memory.
SYSTEM_SHARED_BYTES, COUNTS_SYSTEM_SHARED_FROM = 1024, 90

_FUNCTION = re.compile(r"^\s*Function : (\w+)$", re.M)
_ARCHITECTURE = re.compile(r"^\s*code for (sm_\w+)$", re.M)
_INSTRUCTION = re.compile(
    r"^ +/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ +)?([A-Z]\w*[\w.]*)\s*([^;]*);", re.M
)
_USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_INFO = re.compile(r"^\.nv\.info\.(\w+)$(.*?)(?=^\.(?!nv\.info\.\1))", re.M | re.S)
_THREADS = re.compile(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:\s+\w+\s+Value:\s+((?:0x\w+ *){3})")

LOCAL = {"LDL", "STL"}


@dataclass(frozen=True, slots=True)
class Loop:
    """An innermost loop: where it begins and what one turn through all of it would run."""

    address: int
    counts: Counts


@dataclass(frozen=True, slots=True)
class KernelCode:
    """A kernel as it was compiled for one architecture.

    Parameters
    ----------
    name, architecture : str
    registers : int
        Of a thread.
    shared_bytes : int
        Of a work-group: what the kernel declares, and what it asks for when it is launched.
    local_bytes : int
        Of a thread, in memory: what is spilled, and arrays that are no registers.
    spilled_bytes : int
        Of all its accesses to those, each counted once: 0 if nothing is spilled.
    threads : int
        The most that a work-group has; 0 if unknown.
    counts : Counts
        Of the whole kernel.
    loops : tuple of Loop
        The innermost ones.
    """

    name: str
    architecture: str
    registers: int
    shared_bytes: int
    local_bytes: int
    spilled_bytes: int
    threads: int
    counts: Counts
    loops: tuple[Loop, ...] = field(default=())

    @property
    def main_loop(self) -> Loop | None:
        """The innermost loop that loads most from global memory; of equal ones the longest."""
        return max(
            self.loops,
            key=lambda loop: (loop.counts.global_load_bytes, loop.counts.total),
            default=None,
        )


def parse_sass(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every function that `cuobjdump -sass` prints."""
    _, *parts = _FUNCTION.split(text)
    return {
        name: [_instruction(*found) for found in _INSTRUCTION.findall(body)]
        for name, body in zip(parts[::2], parts[1::2])
    }


def _instruction(address: str, predicate: str, name: str, operands: str) -> Instruction:
    stem = name.partition(".")[0]
    target = re.search(r"0x([0-9a-f]+)\s*$", operands)
    jumps = stem in {"BRA", "JMP"} or name.startswith("WARPSYNC.COLLECTIVE")
    ends = stem in {"BRA", "JMP", "EXIT", "RET", "BRX", "BRXU", "JMX"} and not predicate
    conditional = "," in operands and stem in {"BRA", "JMP"}
    return Instruction(
        int(address, 16),
        name,
        int(target[1], 16) if target and jumps else None,
        not ends or conditional,
    )


def architecture_of(sass: str) -> str:
    """The architecture that `cuobjdump -sass` names, such as "sm_90"."""
    found = _ARCHITECTURE.search(sass)
    if found is None:
        raise ValueError(f"`sass` must name its architecture, got {sass[:80]!r}")
    return found[1]


def parse_threads(elf: str) -> dict[str, int]:
    """The most threads of a work-group, by kernel, from what `cuobjdump -elf` prints."""
    found = {}
    for name, body in _INFO.findall(elf):
        if sizes := _THREADS.search(body):
            x, y, z = (int(size, 16) for size in sizes[1].split())
            found[name] = x * y * z
    return found


def kernels(sass: str, usage: str, elf: str) -> list[KernelCode]:
    """Every kernel of a machine-code image.

    Parameters
    ----------
    sass, usage, elf : str
        What `cuobjdump` prints of it with `-sass`, `-res-usage` and `-elf`.
    """
    architecture, code, threads = architecture_of(sass), parse_sass(sass), parse_threads(elf)
    asked = asked_bytes(elf)
    found = []
    for name, *numbers in _USAGE.findall(usage):
        registers, stack, shared, local = map(int, numbers)
        number = int(re.sub(r"\D", "", architecture))
        if number >= COUNTS_SYSTEM_SHARED_FROM and shared >= SYSTEM_SHARED_BYTES:
            shared -= SYSTEM_SHARED_BYTES
        shared += asked.get(name, 0)
        body = code[name]
        loops = tuple(Loop(each[0].address, count(each)) for each in innermost_loops(body))
        found.append(
            KernelCode(
                name.removesuffix("_kernel"), architecture, registers, shared, stack + local,
                spilled_bytes(body), threads.get(name, 0), count(body), loops,
            )
        )  # fmt: skip
    return found


def spilled_bytes(instructions: Sequence[Instruction]) -> int:
    """Bytes of all stores to and loads from a thread's own memory."""
    own = [each for each in instructions if each.name.partition(".")[0] in LOCAL]
    return sum(access_bits(each.name) // 8 for each in own)
