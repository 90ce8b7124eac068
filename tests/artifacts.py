"""Artifacts for tests: a manifest of this machine and a file with an ELF header, no kernels."""

import platform
import struct

from kivi_tvm.config import KiviConfig
from kivi_tvm.manifest import Manifest

CFG = KiviConfig(head_dim=64, num_heads=8, num_kv_heads=2)
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


def elf_bytes(machine=None, kind=3, size=400):
    """A file that looks like a shared object as far as its header."""
    number = ELF_MACHINES[machine or platform.machine()]
    head = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", kind, number)
    return head + bytes(size - len(head))


def manifest(**changes):
    values = {
        "kernel_key": CFG.kernel_key().to_dict(),
        "target": {"kind": "llvm", "mcpu": "x86-64-v3"},
        "sources": {"attend": "default"},
        "config": CFG.to_dict(),
        "versions": {"kivi_tvm": "0.1.0", "tvm": "0.27.0.post1", "tvm_ffi": "0.1.14.post1"},
    }
    return Manifest(**{**values, **changes})


def export_elf(path):
    path.write_bytes(elf_bytes())
