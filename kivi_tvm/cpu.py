"""The processor of this machine: its name, its instruction sets, and what compiled code needs."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

# LLVM's feature name -> Linux's flag, where they differ, for the features whose instructions LLVM
# emits by itself. Tuning hints ("slow-lea") and features reached only through intrinsics that no
# kernel uses (amx, rdseed, xsave, ...) are absent: they can not make a kernel fail.
_X86_RENAMED = {
    "sse3": "pni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "bmi": "bmi1",
    "lzcnt": "abm",
    "sahf": "lahf_lm",
    "pclmul": "pclmulqdq",
    "sha": "sha_ni",
    "avxvnni": "avx_vnni",
    "avxvnniint8": "avx_vnni_int8",
    "avxvnniint16": "avx_vnni_int16",
    "avxifma": "avx_ifma",
    "avxneconvert": "avx_ne_convert",
    "avx512bf16": "avx512_bf16",
    "avx512bitalg": "avx512_bitalg",
    "avx512fp16": "avx512_fp16",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512vp2intersect": "avx512_vp2intersect",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    # Kernels report APX as one flag; LLVM splits it.
    **dict.fromkeys(("egpr", "ndd", "nf", "ccmp", "cf", "ppx", "push2pop2", "zu"), "apx"),
}
_X86_SAME = (
    "adx aes avx avx2 avx512bw avx512cd avx512dq avx512f avx512ifma avx512vbmi avx512vl avx10.1 "
    "avx10.2 bmi2 cmov cx16 cx8 f16c fma fma4 gfni mmx movbe popcnt sha512 sm3 sm4 sse sse2 sse4a "
    "ssse3 tbm vaes vpclmulqdq xop"
)
_ARM_RENAMED = {
    "fp-armv8": "fp",
    "neon": "asimd",
    "fullfp16": "asimdhp",
    "dotprod": "asimddp",
    "fp16fml": "asimdfhm",
    "rdm": "asimdrdm",
    "lse": "atomics",
    "rcpc": "lrcpc",
    "rcpc-immo": "ilrcpc",
    "complxnum": "fcma",
    "jsconv": "jscvt",
    "crc": "crc32",
    "lse2": "uscat",
    "fptoint": "frint",
}
_ARM_SAME = "aes bf16 i8mm sha2 sha3 sve sve2 sm4 flagm"

FLAG_OF_LLVM_FEATURE = {
    "x86_64": {**{name: name for name in _X86_SAME.split()}, **_X86_RENAMED},
    "aarch64": {**{name: name for name in _ARM_SAME.split()}, **_ARM_RENAMED},
}


def cpu_requirements(llvm_features: Iterable[str], machine: str | None = None) -> tuple[str, ...]:
    """The CPU flags without which code compiled with these LLVM features may fault.

    Parameters
    ----------
    llvm_features : iterable of str
        Features that are on, in LLVM's spelling, with or without a leading "+"; names with a
        leading "-" are off and ignored.
    machine : str or None
        Architecture the code is for, as `platform.machine()` says it; default this one's.

    Returns
    -------
    tuple of str
        Sorted names as in /proc/cpuinfo; empty for an architecture without a table.
    """
    table = FLAG_OF_LLVM_FEATURE.get(machine or platform.machine(), {})
    names = (name.removeprefix("+") for name in llvm_features)
    return tuple(sorted({table[name] for name in names if name in table}))


@cache
def _cpuinfo(path: Path) -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where the file does not exist."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_flags() -> frozenset[str] | None:
    """Instruction-set flags of this machine, or None where the system does not list them."""
    info = _cpuinfo(CPUINFO)
    flags = info.get("flags", info.get("Features"))
    return None if flags is None else frozenset(flags.split())


def missing_cpu_flags(required: Iterable[str]) -> tuple[str, ...]:
    """Those of `required` that this machine lacks; empty where it does not list its flags."""
    flags = cpu_flags()
    return () if flags is None else tuple(sorted(set(required) - flags))


def cpu_name() -> str:
    """The processor's name as it presents itself, else the architecture."""
    info = _cpuinfo(CPUINFO)
    return info.get("model name") or platform.processor() or platform.machine()
