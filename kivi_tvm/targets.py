"""What kernels are compiled for: a TVM target, and the facts about it that schedules use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import device, get_global_func
from tvm.target import Target, codegen, list_tags

from kivi_tvm import cuda, occupancy, target_names
from kivi_tvm.config import INTEGER_MODES, KernelKey, KiviConfig
from kivi_tvm.cpu import cpu_requirements, missing_cpu_flags
from kivi_tvm.errors import UserError

# Bits of a vector register by the feature of LLVM that brings it, widest first.
VECTOR_BITS = {"avx512f": 512, "avx": 256}
# Features of LLVM that offer a dot product of bytes, best first, and its kind.
BYTE_DOTS = (
    ({"avx512vnni", "avxvnni"}, "vnni"),
    ({"avx512bw", "avx2"}, "maddubs"),
    ({"dotprod"}, "sdot"),
)

GPU_KINDS = ("cuda", "opencl")
NO_ARCHITECTURE = "sm_50"  # what TVM takes where none is named and no GPU found
WARP = 32
# Architectures without bfloat16 and `mma.m16n8k16`.
BEFORE_SM_80 = ("sm_70", "sm_72", "sm_75")
EARLY_LAUNCH_FROM = 90
SHARED_BYTES = 48 * 1024  # that every CUDA device gives without being asked


@dataclass(frozen=True, slots=True)
class Hardware:
    """Facts about a target that schedules read; a chip is never an `if`."""

    model: str  # programming model: the folder of its schedules
    vector_bits: int = 0
    vector_registers: int = 0
    byte_dot: str | None = None  # how dot products of bytes are computed: `schedules/byte_dot.py`
    warp: int = 1  # threads that go in step
    tensor_cores: bool = False
    shared_bytes: int = 0  # of a work-group
    dynamic_bytes: int = 0  # of a work-group that asks for more when it is launched
    early_launch: bool = False  # kernels can be launched before earlier ones have ended

    @property
    def float32_lanes(self) -> int:
        """float32 elements in one SIMD register."""
        return self.vector_bits // 32


def resolve(target: str | Mapping[str, Any] | Target) -> Target:
    """A TVM target from what a user names.

    Parameters
    ----------
    target : str, mapping or Target
        "native" (this machine's CPU), a TVM target kind, tag or JSON, or its fields; "cuda" is the
        GPU of this machine, or one that `arch` names.

    Raises
    ------
    UserError
        TVM does not know the target, or kernels for it cannot be built yet.
    """
    if target == "native":
        return _native()
    found = target if isinstance(target, Target) else _parse(target)
    kind = found.kind.name
    if get_global_func(f"target.build.{kind}", allow_missing=True) is None:
        raise UserError(
            f"`target` must be one that TVM can generate code for here, got kind {kind!r}"
        )
    _check_kind(kind)
    if kind == "cuda":
        return _for_cuda(found)
    native = _native()
    if _machine(found) != _machine(native):
        raise UserError(
            f"`target` must be this machine's architecture {_machine(native)}, "
            f"got {_machine(found)}"
        )
    if "mcpu" not in found.attrs:
        return _with_cpu_of(native, found)
    _check_cpu(str(found.attrs["mcpu"]), native)
    return found


def check_schedulable(target: Target) -> None:
    """Refuse a target made by `from_identity` for which no kernel can be scheduled here.

    Raises
    ------
    UserError
        There are no schedules for its kind, or LLVM does not know its processor.
    """
    _check_kind(target.kind.name)
    if target.kind.name == "llvm":
        _check_cpu(str(target.attrs["mcpu"]), target)


def identity(target: Target) -> dict[str, Any]:
    """What tells the target apart for tuning records; see `target_names.identity`."""
    fields = as_dict(target)
    if fields["kind"] == "llvm":
        fields.setdefault("mtriple", codegen.llvm_get_system_triple())
    return target_names.identity(fields)


def is_native(fields: Mapping[str, Any]) -> bool:
    """Tell whether `identity` gave these fields of this machine's own processor, or of its GPU."""
    if fields["kind"] == "cuda":
        return bool(device("cuda").exist) and dict(fields) == identity(_for_cuda(Target("cuda")))
    return dict(fields) == identity(_native())


def slug(target: Target) -> str:
    """The name of the target's directory of tuning records, for example `llvm-x86_64-znver4`."""
    return target_names.slug(identity(target))


def from_identity(fields: Mapping[str, Any]) -> Target:
    """A target with the identity `fields`, also for another machine than this.

    Raises
    ------
    ValueError
        TVM knows no such target.
    """
    options = {name: x for name, x in fields.items() if name not in ("machine", "system")}
    if triple := target_names.triple(fields):
        machine = fields["machine"]
        # LLVM ends the process when it is asked about an architecture that it does not have.
        if machine not in map(str, codegen.llvm_get_targets()):
            raise ValueError(f"`target` must be of a machine that LLVM knows, got {machine!r}")
        options["mtriple"] = triple
    try:
        return Target(options)
    except Exception as error:  # TVM raises several types, InternalError among them
        raise ValueError(f"`target` must be one TVM knows, got {dict(fields)} ({error})") from error


def as_dict(target: Target) -> dict[str, Any]:
    """The target as plain JSON data."""
    fields: dict[str, Any] = json.loads(str(target))
    return fields


def required_cpu_flags(target: Target) -> tuple[str, ...]:
    """Flags of /proc/cpuinfo without which code for the target may fault."""
    return cpu_requirements(codegen.llvm_get_cpu_features(target.host or target))


def hardware(target: Target) -> Hardware:
    """The facts that schedules use."""
    if target.kind.name in GPU_KINDS:
        arch = _architecture(target)
        return Hardware(
            "gpu",
            warp=WARP,
            tensor_cores=target.kind.name == "cuda" and arch not in BEFORE_SM_80,
            shared_bytes=SHARED_BYTES,
            dynamic_bytes=occupancy.group_bytes(arch) or SHARED_BYTES,
            early_launch=cuda.number_of(arch) >= EARLY_LAUNCH_FROM,
        )
    features = set(map(str, codegen.llvm_get_cpu_features(target)))
    byte_dot = next((kind for needs, kind in BYTE_DOTS if needs & features), None)
    # TVM's own figure is 512 for every x86.
    widths = (bits for feature, bits in VECTOR_BITS.items() if feature in features)
    width = next(widths, 128) if _is_x86(target) else int(codegen.llvm_get_vector_width(target))
    registers = 16 if _is_x86(target) and width < 512 else 32
    return Hardware(model="cpu", vector_bits=width, vector_registers=registers, byte_dot=byte_dot)


def kernel_key(cfg: KiviConfig, target: Target) -> KernelKey:
    """What a module of `cfg` for `target` depends on, with the mode that "auto" is there.

    Raises
    ------
    UserError
        The target has no such compute mode or dtype.
    """
    if target.kind.name in GPU_KINDS:
        if cfg.compute in INTEGER_MODES:
            raise UserError(
                f"`compute` must be 'auto', 'float' or 'half' for GPUs, got {cfg.compute!r}: "
                "modes of integers are for CPUs"
            )
        arch = _architecture(target)
        if cfg.dtype == "bfloat16" and arch in BEFORE_SM_80:
            raise UserError(f"`dtype` must not be 'bfloat16' for {arch}: CUDA has it from sm_80 on")
    facts = hardware(target)
    if cfg.compute == "half" and not facts.tensor_cores:
        raise UserError(
            "`compute` must not be 'half' for targets without tensor cores, which CUDA has from "
            f"sm_80 on; got target {as_dict(target)['kind']}"
        )
    return cfg.kernel_key(byte_dot=facts.byte_dot is not None, tensor_cores=facts.tensor_cores)


def _architecture(target: Target) -> str:
    """The architecture of a CUDA target, such as "sm_90"; "" for other kinds."""
    return cuda.base_architecture(str(target.attrs.get("arch", "")))


def _is_x86(target: Target) -> bool:
    return _machine(target) in ("x86_64", "i386", "i486", "i586", "i686")


def _parse(target: str | Mapping[str, Any]) -> Target:
    try:
        return Target(_fields(target))
    except Exception as error:  # TVM raises several types, InternalError among them
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        name = target.get("kind") if isinstance(target, Mapping) else target
        close = target_names.nearest(str(name), _known_names())
        hint = f"; nearest: {', '.join(close)}" if close else ""
        raise UserError(
            f"`target` must be one TVM knows, got {target!r} ({reason}){hint}"
        ) from error


def _known_names() -> list[str]:
    return ["native", *Target.list_kinds(), *map(str, list_tags())]


def _with_cpu_of(native: Target, found: Target) -> Target:
    """`found` for this machine's processor, with the features that either turns on or off."""
    here, asked = as_dict(native), as_dict(found)
    features = [*here.get("mattr", []), *asked.get("mattr", [])]
    return Target({**here, **asked, **({"mattr": features} if features else {})})


def _check_kind(kind: str) -> None:
    if kind not in ("llvm", "cuda"):
        raise UserError(
            f"`target` must be 'native' or of kind 'llvm' or 'cuda', got kind {kind!r}, "
            "which the runtime cannot launch kernels on"
        )


def _for_cuda(found: Target) -> Target:
    """The target with its host, once it is known that it can be compiled for.

    The host is any processor of this machine's architecture: it only launches kernels. No kernel
    uses what is specific to an architecture: for "sm_90a", which TVM finds on an H100, code and
    tuning records are those of "sm_90".
    """
    known = cuda.known_architectures()
    if not known:
        raise UserError(f"`target` of kind 'cuda' {cuda.NEEDS_COMPILER}")
    fields = as_dict(found)
    name = str(fields["arch"])
    if name == NO_ARCHITECTURE:
        raise UserError(
            "`target` of kind 'cuda' must name an architecture where there is no GPU, such as "
            "{'kind': 'cuda', 'arch': 'sm_90'} or a tag such as 'nvidia/nvidia-h100'"
        )
    if cuda.base_architecture(name) not in known:
        close = target_names.nearest(name, known)
        hint = f"; nearest: {', '.join(close)}" if close else ""
        raise UserError(
            f"`arch` must be one that {cuda.find_compiler()} knows ({', '.join(known)}), "
            f"got {name!r}{hint}"
        )
    fields.pop("tag", None)
    fields["arch"] = cuda.base_architecture(name)
    host = {"kind": "llvm", "mtriple": codegen.llvm_get_system_triple(), "mcpu": "generic"}
    return Target({**fields, "host": host})


def _check_cpu(name: str, native: Target) -> None:
    """LLVM would take "generic" for a processor that it does not know, and go on."""
    known = {"generic", *map(str, codegen.llvm_get_cpu_archlist(native))}
    if name not in known:
        close = target_names.nearest(name, known)
        hint = f"; nearest: {', '.join(close)}" if close else ""
        raise UserError(
            f"`mcpu` must be a processor that LLVM knows on {_machine(native)}, got {name!r}{hint}"
        )


def _fields(target: str | Mapping[str, Any]) -> str | dict[str, Any]:
    if isinstance(target, str) and target.lstrip().startswith("{"):
        fields: dict[str, Any] = json.loads(target)
        return fields
    return target if isinstance(target, str) else dict(target)


def _machine(target: Target) -> str:
    """The architecture; LLVM takes this machine's where the target names none."""
    named = target.attrs.get("mtriple")
    return str(named or codegen.llvm_get_system_triple()).split("-", 1)[0]


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
