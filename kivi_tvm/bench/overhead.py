"""What one `decode` call costs besides its kernels: Python, argument checks, torch and the FFI.

The overhead is the time of a call in which every kernel is replaced by a compiled function that
takes the same arguments through the same FFI and returns at once. A difference between the real
call and its kernels would drown in the noise of the kernels' threads; it is shown beside, with
the kernels timed by TVM's time evaluator, a loop in C++ over the same functions and arguments.
"""

from __future__ import annotations

import statistics
import struct
import time
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import tvm_ffi

from kivi_tvm.bench.harness import Timing
from kivi_tvm.bench.record import Environment
from kivi_tvm.workloads import Inputs, Workload, make_inputs

if TYPE_CHECKING:
    from kivi_tvm.runtime import Module

LIMIT_US = 15.0
# Every call adds a token: few enough that the kernels' time stays the same.
CALLS_PER_ROUND = 48
KERNEL_RUNS, KERNEL_REPEATS = 10, 20
CPU_DEVICE = 1


@dataclass(frozen=True, slots=True)
class Overhead:
    """A `decode` call, the same call with empty kernels, and its kernels, in microseconds."""

    workload: str
    overhead: Timing
    call: Timing
    kernels_us: dict[str, float]
    environment: Environment

    @property
    def passed(self) -> bool:
        return self.overhead.p50_us < LIMIT_US

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self) | {"limit_us": LIMIT_US, "passed": self.passed}


class EmptyKernels:
    """A library in which every kernel takes its arguments through the FFI and does nothing."""

    def __init__(self) -> None:
        self.nop: Callable[..., Any] = tvm_ffi.get_global_func("testing.nop")

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.nop


class Recorder:
    """A library that notes the name and the arguments of every kernel call."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getitem__(self, name: str) -> Callable[..., Any]:
        kernel = self.library[name]

        def call(*args: Any) -> Any:
            self.calls.append((name, args))
            return kernel(*args)

        return call


def with_library(module: Module, library: Any) -> Module:
    """`module` with other kernels."""
    changed = copy(module)
    changed.library = library
    return changed


def decode_step(module: Module, inputs: Inputs) -> Callable[[], object]:
    """A `decode` call that allocates its output, on a new cache with the prefill of `inputs`."""
    cache = module.new_cache(batch_size=inputs.k.shape[0])
    cache.prefill(inputs.k, inputs.v)
    return partial(cache.decode, inputs.q[0], inputs.k_new[0], inputs.v_new[0])


def calls_us(module: Module, inputs: Inputs) -> list[float]:
    """Times of `CALLS_PER_ROUND` successive `decode` calls, after one that is not timed."""
    step = decode_step(module, inputs)
    step()
    times = []
    for _ in range(CALLS_PER_ROUND):
        start = time.perf_counter_ns()
        step()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return times


def kernels_us(module: Module, inputs: Inputs) -> dict[str, float]:
    """Time of every kernel of the middle one of those calls; the sum where one runs twice."""
    recorder = Recorder(module.library)
    step = decode_step(with_library(module, recorder), inputs)
    for _ in range(CALLS_PER_ROUND // 2):
        recorder.calls.clear()
        step()
    times = dict.fromkeys([name for name, _ in recorder.calls], 0.0)
    # Every repetition of `advance` makes the sequences longer than their pages, so it is last.
    for name, args in sorted(recorder.calls, key=lambda call: call[0] == "advance"):
        times[name] += kernel_us(module.library, name, args)
    return times


def kernel_us(library: Any, name: str, args: tuple[Any, ...]) -> float:
    """Median time of one run of a kernel, without Python, in microseconds."""
    module = getattr(library.module, "mod", library.module)
    make = tvm_ffi.get_global_func("runtime.RPCTimeEvaluator")
    no_cooling = (0, 0, 0, 1, 0, "")
    evaluate = make(module, name, CPU_DEVICE, 0, KERNEL_RUNS, KERNEL_REPEATS, *no_cooling)
    seconds: tuple[float, ...] = struct.unpack(f"{KERNEL_REPEATS}d", bytes(evaluate(*args)))
    return statistics.median(seconds) * 1e6


def run(w: Workload, rounds: int = 10, target: str = "native") -> Overhead:
    """Measure the overhead of `decode` on a short cache of `w`'s geometry.

    The cache holds two windows and a few tokens: pages exist and every call packs a value.

    Parameters
    ----------
    w : Workload
        Its `tokens`, `data` and `lengths` are not used.
    rounds : int
        Each times 48 calls of either kind, and 200 runs of every kernel.
    target : str

    Returns
    -------
    Overhead
    """
    import kivi_tvm

    w = replace(w, tokens=2 * w.residual_length + 8, data="normal", lengths=None)
    module = kivi_tvm.build(w.cfg, target=target)
    empty = with_library(module, EmptyKernels())
    inputs = make_inputs(w)
    overheads: list[float] = []
    calls: list[float] = []
    kernels: list[dict[str, float]] = []
    for _ in range(rounds):
        overheads += calls_us(empty, inputs)
        calls += calls_us(module, inputs)
        kernels.append(kernels_us(module, inputs))
    medians = {name: statistics.median(each[name] for each in kernels) for name in kernels[0]}
    return Overhead(w.id, Timing.of(overheads), Timing.of(calls), medians, Environment.current())
