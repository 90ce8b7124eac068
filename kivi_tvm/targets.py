"""What kernels are compiled for: a TVM target, and the facts about it that schedules use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.target import Target, codegen

from kivi_tvm.cpu import cpu_requirements, missing_cpu_flags
from kivi_tvm.errors import UserError


@dataclass(frozen=True, slots=True)
class Hardware:
    """Facts about a target that schedules read; a chip is never an `if`."""

    model: str  # programming model: the folder of its schedules
    vector_bits: int

    @property
    def float32_lanes(self) -> int:
        """float32 elements in one SIMD register."""
        return self.vector_bits // 32


def resolve(target: str | Mapping[str, Any] | Target) -> Target:
    """A TVM target from what a user names.

    Parameters
    ----------
    target : str, mapping or Target
        "native" (this machine's CPU), a TVM target kind, tag or JSON, or its fields.

    Raises
    ------
    UserError
        TVM does not know the target, or kernels for it cannot be built yet.
    """
    if target == "native":
        return _native()
    try:
        found = target if isinstance(target, Target) else Target(_fields(target))
    except Exception as error:  # TVM raises several types, InternalError among them
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(f"`target` must be one TVM knows, got {target!r} ({reason})") from error
    if found.kind.name != "llvm":
        raise UserError(
            f"`target` must be of kind 'llvm' or 'native', got kind {found.kind.name!r}"
        )
    if "mtriple" in found.attrs and _machine(found) != _machine(_native()):
        raise UserError(
            f"`target` must be this machine's architecture {_machine(_native())}, "
            f"got {_machine(found)}"
        )
    return found if "mcpu" in found.attrs else _native()


def as_dict(target: Target) -> dict[str, Any]:
    """The target as plain JSON data."""
    fields: dict[str, Any] = json.loads(str(target))
    return fields


def required_cpu_flags(target: Target) -> tuple[str, ...]:
    """Flags of /proc/cpuinfo without which code for the target may fault."""
    return cpu_requirements(codegen.llvm_get_cpu_features(target))


def hardware(target: Target) -> Hardware:
    """The facts that schedules use."""
    return Hardware(model="cpu", vector_bits=int(codegen.llvm_get_vector_width(target)))


def _fields(target: str | Mapping[str, Any]) -> str | dict[str, Any]:
    if isinstance(target, str) and target.lstrip().startswith("{"):
        fields: dict[str, Any] = json.loads(target)
        return fields
    return target if isinstance(target, str) else dict(target)


def _machine(target: Target) -> str:
    return str(target.attrs["mtriple"]).split("-", 1)[0]


def _native() -> Target:
    fields = {
        "kind": "llvm",
        "mtriple": codegen.llvm_get_system_triple(),
        "mcpu": codegen.llvm_get_system_cpu(),
    }
    found = Target(fields)
    # A virtual machine may hide features of the processor that LLVM recognizes by its family.
    hidden = set(missing_cpu_flags(required_cpu_flags(found)))
    if hidden:
        off = [
            f"-{name}"
            for name in sorted(codegen.llvm_get_cpu_features(found))
            if hidden.intersection(cpu_requirements([name]))
        ]
        found = Target({**fields, "mattr": off})
    return found
