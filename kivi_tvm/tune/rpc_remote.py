"""The far end of RPC measuring: memory, calls and times on one server."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import torch
import tvm
from torch import Tensor
from tvm import te
from tvm.s_tir import Schedule

from kivi_tvm import targets
from kivi_tvm.host import find_cxx
from kivi_tvm.lowering import compile_module
from kivi_tvm.tune.measure import SAMPLES, Guarded, filled, judge

# Read between two timed calls so that the second finds its arguments in memory; an evaluator calls
# once before it times, so that rotating over copies would not do.
FLUSH_BYTES = 128 << 20
COLD_CALLS = 3 * SAMPLES
WARM_SAMPLE_MS = 5
READ_BYTES = 256 << 20
READ_ROWS = 64
Json = dict[str, Any]


class Remote:
    """A session on one free server, and the memory of a call there."""

    def __init__(self, session: Any, threads: int) -> None:
        self.session = session
        self.device = session.cpu(0)
        if threads:
            session.get_function("runtime.config_threadpool")(1, threads)

    def load(self, library: str, number: int = 0) -> Any:
        """An uploaded library, as a module there; `number` tells those of a session apart."""
        # Never onto a file that is open as a library: that ends the process.
        name = f"{number}-{Path(library).name}"
        self.session.upload(library, name)
        return self.session.load_module(name)

    def send(self, x: Tensor, words: bool) -> Any:
        """A compact copy of `x` there."""
        x = x.contiguous()
        x = x.view(torch.uint32) if words else x
        there = tvm.runtime.empty(tuple(x.shape), str(x.dtype).removeprefix("torch."), self.device)
        if x.numel():
            tvm.runtime.from_dlpack(x).copyto(there)
        return there

    def fetch(self, there: Any, like: Tensor, words: bool) -> Tensor:
        """What is there now, in the dtype of `like`."""
        here = torch.empty(like.shape, dtype=like.dtype)
        if here.numel():
            there.copyto(tvm.runtime.from_dlpack(here.view(torch.uint32) if words else here))
        return here

    def check(self, kernel: Any, call: Json) -> tuple[float, float]:
        """Run one call of the check there; its error and limit."""
        arguments = call["arguments"]
        there = [
            a["scalar"] if "scalar" in a else self.send(a["tensor"], a["words"]) for a in arguments
        ]
        kernel(*there)
        self.device.sync()
        held: list[Guarded | None] = []
        for argument, remote in zip(arguments, there):
            if "scalar" in argument:
                held.append(None)
                continue
            before, after = argument["tensor"], argument["after"]
            found = self.fetch(remote, before, argument["words"])
            expected = (before if after is None else after).clone(
                memory_format=torch.contiguous_format
            )
            held.append(Guarded(found, found, expected, expected))
        return judge(call, held)

    def timed_arguments(self, call: Json) -> list[Any]:
        """The arguments of a timed call there."""
        found = []
        for number, argument in enumerate(call["arguments"]):
            if "scalar" in argument:
                found.append(argument["scalar"])
                continue
            x = filled(argument, number) if "fill" in argument else argument["tensor"]
            found.append(self.send(x, argument["words"]))
        return found

    def times_us(self, module: Any, name: str, call: Json, arguments: list[Any]) -> list[float]:
        """`SAMPLES` times of a call; each finds cold arguments in memory, not in a cache."""
        if any(argument.get("cold") for argument in call["arguments"]):
            evaluate = module.time_evaluator(
                name, self.device, number=1, repeat=COLD_CALLS, cache_flush_bytes=FLUSH_BYTES
            )
            found = [1e6 * s for s in evaluate(*arguments).results]
            return [statistics.median(found[i::SAMPLES]) for i in range(SAMPLES)]
        evaluate = module.time_evaluator(
            name, self.device, number=1, repeat=SAMPLES, min_repeat_ms=WARM_SAMPLE_MS
        )
        return [1e6 * s for s in evaluate(*arguments).results]


def read_gb_per_s(remote: Remote, target: Json, folder: Path) -> float:
    """GB/s that all threads of a CPU read; `folder` keeps the library that does it."""
    library = folder / "read.so"
    if not library.exists():
        _export_read(target, library)
    module = remote.load(str(library))
    x = tvm.runtime.empty((READ_ROWS, READ_BYTES // 4 // READ_ROWS), "int32", remote.device)
    out = tvm.runtime.empty((READ_ROWS,), "int32", remote.device)
    module["write"](x)  # pages that nobody wrote are all one page of zeros
    evaluate = module.time_evaluator("read", remote.device, number=1, repeat=8)
    return float(READ_BYTES / min(evaluate(x, out).results) / 1e9)


def _export_read(target: Json, library: Path) -> None:
    """Kernels that write and read memory; integers, whose sums LLVM vectorizes."""
    shape = (READ_ROWS, READ_BYTES // 4 // READ_ROWS)
    x = te.placeholder(shape, "int32", name="x")
    k = te.reduce_axis((0, shape[1]), "k")
    tensors = {
        "read": [x, te.compute(shape[:1], lambda i: te.sum(x[i, k], k), name="out")],
        "write": [te.compute(shape, lambda i, j: i + j, name="out")],
    }
    functions = {name: te.create_prim_func(given) for name, given in tensors.items()}
    schedule = Schedule(
        tvm.IRModule({n: f.with_attr("global_symbol", n) for n, f in functions.items()})
    )
    for name in functions:
        schedule.work_on(name)
        schedule.parallel(schedule.get_loops(schedule.get_sblock("out"))[0])
    part = library.with_name(f".{os.getpid()}.so")
    compiled = compile_module(schedule.mod, targets.resolve(target))
    compiled.export_library(str(part), cc=find_cxx())
    os.replace(part, library)
