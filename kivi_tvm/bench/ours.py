"""The compiled cache as a provider of decode attention: every compute mode, tuned and default."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kivi_tvm import layout, targets
from kivi_tvm.bench.provider import OURS, Provider, Setting
from kivi_tvm.config import COMPUTE_MODES, INTEGER_MODES, MAX_INTEGER_BITS, KiviConfig
from kivi_tvm.database import Found
from kivi_tvm.errors import UserError
from kivi_tvm.reference import ReferenceCache
from kivi_tvm.runtime.module import Module, build, build_with
from kivi_tvm.tune.cases.tolerance import limit
from kivi_tvm.workloads import Inputs, Workload

# On data that is not "normal". Outputs that are almost 0 lose digits in float32 (1e-5 was seen at
# 2,048 tokens).
HARD_L2 = {"float": 1e-4, "int8x2": 1e-3, "int8": 1e-1, "half": 5e-3}


def kivi_bytes(cfg: KiviConfig, lengths: Sequence[int]) -> int:
    """Bytes that `attend` must read: tokens whose key and value are packed, and the windows."""
    total = 0
    for length in lengths:
        pages = layout.page_buffers(cfg, layout.num_pages(cfg, layout.packed_values(cfg, length)))
        total += sum(buffer.nbytes for buffer in pages.values())
        window = 2 * cfg.H_kv * min(length, cfg.R) * cfg.D
        total += window * layout.DTYPE_BYTES[cfg.dtype]
    return total


def modes(
    w: Workload, names: Sequence[str] | None = None, target: str = "native"
) -> dict[str, bool]:
    """Compute modes to run, and whether "auto" takes it; one that "auto" takes is run once.

    Parameters
    ----------
    w : Workload
    names : sequence of str, optional
        Of `COMPUTE_MODES`; default all that the bits of `w` and the target allow.
    target : str
        What "auto" depends on.

    Raises
    ------
    UserError
        A mode is not known or not possible with these bits.
    """
    most, resolved = max(w.key_bits, w.value_bits), targets.resolve(target)

    def is_possible(mode: str) -> bool:
        try:
            targets.kernel_key(replace(w, compute=mode).cfg, resolved)
        except (UserError, ValueError):
            return False
        return True

    if names is None:
        names = list(filter(is_possible, COMPUTE_MODES))
    taken = targets.kernel_key(replace(w, compute="auto").cfg, resolved).compute
    found: dict[str, bool] = {}
    for name in names:
        if name not in COMPUTE_MODES:
            raise UserError(f"`compute` must be among {list(COMPUTE_MODES)}, got {name!r}")
        if name in INTEGER_MODES and most > MAX_INTEGER_BITS:
            rule = f"must have at most {MAX_INTEGER_BITS} bits for {name!r}"
            raise UserError(f"`compute` {rule}, got {most}")
        mode = taken if name == "auto" else name
        found[mode] = found.get(mode, False) or name == "auto"
    return found


def modules(cfg: KiviConfig, target: str) -> dict[str, Module]:
    """What is built for users, and beside it the default schedules if that is tuned."""
    built = {"kivi-tvm": build(cfg, target)}
    if "tuned" in built["kivi-tvm"].manifest["sources"].values():
        built["kivi-tvm-default"] = build_with(cfg, targets.resolve(target), Found())
    return built


def expected(w: Workload, inputs: Inputs) -> Tensor:
    """What the reference makes of the first decode step, `[B, H, D]` float64."""
    cache = ReferenceCache(w.cfg, w.batch_size)
    cache.prefill(inputs.k, inputs.v, inputs.lengths)
    return cache.decode(inputs.q[0], inputs.k_new[0], inputs.v_new[0])


def tolerance(w: Workload, mode: str) -> float:
    """Largest relative L2 error that counts as correct for the data and dtype of `w`."""
    bound = limit(getattr(torch, w.dtype), compute=mode)
    return bound if w.data == "normal" else max(bound, HARD_L2[mode])


def providers(setting: Setting, compute: Sequence[str] | None, target: str) -> Iterator[Provider]:
    """`decode` in each mode; every call makes its cache one token longer."""
    w, inputs = setting.w, setting.inputs
    right = expected(w, inputs)
    nbytes = kivi_bytes(w.cfg, setting.lengths)
    for mode, auto in modes(w, compute, target).items():
        for prefix, module in modules(replace(w, compute=mode).cfg, target).items():
            name = prefix.replace("kivi-tvm", f"kivi-tvm-{mode}")
            source = module.manifest["sources"]["attend"]
            calls = [call(module, w, inputs) for _ in range(setting.copies(nbytes))]
            bound = tolerance(w, mode)
            yield Provider(name, source, calls, nbytes, right, bound, OURS, mode, auto)


def call(module: Module, w: Workload, inputs: Inputs) -> Callable[[], Any]:
    """One `decode` of a new cache that holds the prefill."""
    cache = module.new_cache(num_layers=1, batch_size=w.batch_size)
    cache.prefill(inputs.k, inputs.v, lengths=inputs.lengths)
    return partial(cache.decode, inputs.q[0], inputs.k_new[0], inputs.v_new[0])
