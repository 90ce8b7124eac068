"""A process that measures candidates on servers of an RPC tracker, one session per candidate.

Requests and answers are lines as of `measure.py serve`; here `measure` checks and times at once,
since both need the session. A lost connection is the failure "crash", which may be the server's
fault; a session that its server ended for taking too long is "timeout", the candidate's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import tvm
from torch import Tensor
from tvm import rpc

from kivi_tvm.tune.measure import FORMAT, SAMPLES, Guarded, Wrong, filled, judge

# Read between two timed calls so that the second finds its arguments in memory; an evaluator calls
# once before it times, so that rotating over copies would not do.
FLUSH_BYTES = 128 << 20
COLD_CALLS = 3 * SAMPLES
WARM_SAMPLE_MS = 5
READ_BYTES = 256 << 20
READ_ROWS = 64
# In the errors of a connection that ended, in TVM's C++ and Python.
CONNECTION_WORDS = ("SockChannel", "Socket", "RPC", "connection", "Connection")
Json = dict[str, Any]


class Remote:
    """A session on one free server, and the memory of a call there."""

    def __init__(self, session: Any, kind: str, threads: int) -> None:
        self.session = session
        self.device = session.device(kind, 0)
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


class Servers:
    """Sessions on the servers of one key, and the case that is loaded."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.case: Json = {}
        self.running = 0  # of a comparison's candidates

    def answer(self, request: Json) -> Json:
        """The answer to one request."""
        try:
            found: Json = getattr(self, f"do_{request['do']}")(request)
            return found
        except Wrong as error:
            return _failure("wrong", str(error))
        except Exception as error:
            return _blame(error) | {"culprit": self.running}

    def do_load(self, request: Json) -> Json:
        self.case = torch.load(request["case"], weights_only=True)
        if self.case["format"] != FORMAT:
            return _failure("load", f"`format` must be {FORMAT}, got {self.case['format']}")
        return {"function": self.case["function"], "nbytes": self.case["nbytes"]}

    def do_device(self, request: Json) -> Json:
        with self.session() as remote:
            count = remote.session.get_function("runtime.NumThreads")
            return {"name": remote.device.device_name, "threads": int(count())}

    def do_measure(self, request: Json) -> Json:
        name = self.case["function"]
        with self.session() as remote:
            module = remote.load(request["library"])
            errors = [remote.check(module[name], call) for call in self.case["check"]]
            error, limit = max(errors, key=lambda e: e[0] / (e[1] or 1))
            if not request["time"]:
                return {"max_error": error, "error_limit": limit}
            times = self._times(remote, module, self._timed(remote))
            return {"max_error": error, "error_limit": limit, "times_us": times}

    def do_compare(self, request: Json) -> Json:
        """One sample per round and library, in turn, the order reversed every round."""
        libraries, rounds = request["libraries"], request["rounds"]
        samples: list[list[float]] = [[] for _ in libraries]
        with self.session(1 + rounds * len(libraries)) as remote:
            modules = [remote.load(library, i) for i, library in enumerate(libraries)]
            arguments = self._timed(remote)
            for number in range(rounds):
                for i in range(len(modules))[:: -1 if number % 2 else 1]:
                    self.running = i
                    times = self._times(remote, modules[i], arguments)
                    samples[i].append(statistics.median(times))
        return {"times_us": samples}

    def do_bandwidth(self, request: Json) -> Json:
        with self.session() as remote:
            if self.given.kind == "cuda":
                return {"gb_per_s": _copy_rate(remote)}
            library = Path(request["folder"]) / "read.so"
            if not library.exists():
                _export_read(request["target"], library)
            module = remote.load(str(library))
            shape = (READ_ROWS, READ_BYTES // 4 // READ_ROWS)
            x = tvm.runtime.empty(shape, "int32", remote.device)
            out = tvm.runtime.empty((READ_ROWS,), "int32", remote.device)
            module["write"](x)  # pages that nobody wrote are all one page of zeros
            evaluate = module.time_evaluator("read", remote.device, number=1, repeat=8)
            return {"gb_per_s": READ_BYTES / min(evaluate(x, out).results) / 1e9}

    def _timed(self, remote: Remote) -> list[list[Any]]:
        return [remote.timed_arguments(call) for call in self.case["timed"]]

    def _times(self, remote: Remote, module: Any, arguments: list[list[Any]]) -> list[float]:
        """Samples of the case from those of its calls."""
        samples = []
        for call, given in zip(self.case["timed"], arguments):
            times = remote.times_us(module, self.case["function"], call, given)
            samples.append([call["weight"] * t for t in times])
        return [sum(row) for row in zip(*samples)]

    @contextmanager
    def session(self, share: int = 1) -> Iterator[Remote]:
        """A session on a server that is free, or gets free; `share` times as long as usual."""
        given = self.given
        tracker = rpc.connect_tracker(given.host, given.port)
        try:
            session = tracker.request(given.key, session_timeout=share * given.session_timeout)
        finally:
            tracker.close()
        yield Remote(session, given.kind, given.threads)


def _blame(error: Exception) -> Json:
    """The failure that an exception of a session means; "lost": it may be the server's fault."""
    lines = str(error).strip().splitlines() or [""]
    if "RPCSessionTimeoutError" in str(error):
        return _failure("timeout", "the session took too long")
    found = _failure("crash", f"{type(error).__name__}: {lines[-1]}")
    return found | {"lost": any(word in str(error) for word in CONNECTION_WORDS)}


def _failure(kind: str, message: str) -> Json:
    return {"failure": {"kind": kind, "message": message}}


def _copy_rate(remote: Remote) -> float:
    """GB/s read and written by copies on the device; for a GPU, where reading alone is as fast."""
    import time

    x, y = (tvm.runtime.empty((READ_BYTES // 4,), "int32", remote.device) for _ in range(2))
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        x.copyto(y)
        remote.device.sync()
        best = min(best, time.perf_counter() - start)
    return 2 * READ_BYTES / best / 1e9


def _export_read(target: Json, library: Path) -> None:
    """Kernels that write and read memory; integers, whose sums LLVM vectorizes."""
    from tvm import te
    from tvm.s_tir import Schedule

    from kivi_tvm import targets
    from kivi_tvm.host import find_cxx

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
    compiled = tvm.compile(schedule.mod, target=targets.resolve(target))
    compiled.export_library(str(part), cc=find_cxx())
    os.replace(part, library)


def main(words: Sequence[str] | None = None) -> None:
    """Answer requests until stdin ends; what TVM prints goes to stderr."""
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("key")
    parser.add_argument("--kind", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--session-timeout", type=float, default=60.0)
    servers = Servers(parser.parse_args(words))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(answer: Json) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    send({"ready": True})
    for line in sys.stdin:
        send(servers.answer(json.loads(line)))


if __name__ == "__main__":
    main()
