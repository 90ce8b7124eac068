"""Check and time compiled candidates. Stand-alone: needs torch, tvm-ffi and TVM's runtime library.

    python measure.py serve            requests on stdin, answers on stdout, one JSON object a line
    python measure.py batch DIR        DIR/candidates.json -> DIR/results.jsonl

Requests of `serve`; every answer but `{"at": i}` ends one, a failure is
`{"failure": {"kind": ..., "message": ...}}`:

    {"do": "device"}                         -> {"name", "kind", "threads"}
    {"do": "load", "case": PATH}             -> {"function", "nbytes"}
    {"do": "check", "library": PATH}         -> {"max_error", "error_limit"}
    {"do": "time", "library": PATH}          -> {"times_us": [...]}
    {"do": "compare", "libraries": [PATH, ...], "rounds": n}
                                             -> {"at": i} ..., {"times_us": [[...], ...]}, or
                                                {"failure", "culprit": i}
    {"do": "bandwidth"}                      -> {"gb_per_s"}

`candidates.json` is `{"complete", "checksum", "device", "rounds", "files": {FILE: SHA-256},
"candidates": [{"id", "task", "decisions", "library", "case"}, ...]}` and more, files relative to
DIR; `kivi_tvm.tune.emit` writes it. A line of `results.jsonl` is one of

    {"folder", "device", "read_gb_per_s", "versions"}       the first; `folder` is the `checksum`
    {"id", "times_us", "max_error", "error_limit"}          a candidate
    {"id", "failure"}                                       a candidate that was dropped
    {"task", "compared": {ID: times}, "failed": {ID: failure}}
                                        after those of a task: its default and its best in turn

with a "checksum" of its own and, but for the first, "seconds". What has a line is skipped, so that
a batch that was cut off is continued by the same command. A candidate without a library, because
it could not be compiled, is left out.

A case (`torch.save` of plain data) is `{"format": 1, "function", "nbytes", "check": [CALL, ...],
"timed": [CALL, ...]}`; `kivi_tvm.tune.cases` writes it. A CALL is
`{"weight", "arguments", "close"}`, an argument one of

    {"scalar": x}
    {"tensor": T, "after": T or None, "words": bool, "cold": bool}    after: None is unchanged
    {"fill": HOW, "amount": x, "shape", "dtype", "words", "cold"}     a name in `FILLS`

`words` are passed as uint32; `cold` ones are rotated over copies that together exceed the last
cache. `close` lists what is compared by relative L2 and not bit for bit: `{"of": [i] or
[acc, stat], "group": T, "limits": [x, ...], "expected": [T, ...]}`; `group` says for every position
of the leading dimensions in which group it counts, `UNTOUCHED` or `ANY`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import tvm_ffi
from torch import Tensor

FORMAT = 1
RESULTS = "results.jsonl"
UNTOUCHED, ANY = -1, -2  # in `group`: equal bit for bit; whatever it is
POISON_WORD = 0x5A5A5A5A
# Quiet NaNs with a payload that no kernel and no cast produces: a write is always seen.
POISON_NAN = {
    torch.float16: (torch.int16, 0x7E5A),
    torch.bfloat16: (torch.int16, 0x7FDA),
    torch.float32: (torch.int32, 0x7FDA5A5A),
}
GUARD_BYTES = 4096  # around every tensor of a check; keeps its alignment
# Copies must not survive a full turn: four times L3 also defeats a cache that is not strictly LRU.
COLD_FACTOR = 4
COPIES_BYTES = 3 << 29
MAX_COPIES = 1024
WARM_CALLS = 50
FALLBACK_CACHE_BYTES = 32 << 20
FILL_BLOCK = 1 << 20
SAMPLES = 15  # at least
SAMPLED_US = 60e3  # of timed calls per candidate and call, at least
SAMPLE_US = 1e3  # of a sample: short, so that some fall between what others do
# A sample during which our threads waited longer than this share of it for a processor is
# disturbed, and taken again as often as that is affordable.
DISTURBED = 0.01
MAX_ATTEMPTS = 4
READ_BYTES = 512 << 20
GRAPH_CALLS = 32  # of a CUDA graph, at least: replaying one takes as long as a short kernel
# Where the machine code begins that a CUDA source carries: as `kivi_tvm.cuda` writes it.
MACHINE_CODE = "\n// kivi-tvm: machine code of the above, as base64\n// "
FINALISTS = 5  # candidates of a batch that are compared with the default at the end
START_TIMEOUT_S = 300.0  # importing torch from a cold network disk takes minutes
END_CHARS = 300  # of both ends of a worker's stderr, in a failure's message

Kernel = Callable[..., Any]
Json = dict[str, Any]


# Memory


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory that no result may depend on."""
    if dtype not in POISON_NAN:
        return torch.full(tuple(shape), POISON_WORD, dtype=dtype)
    held, word = POISON_NAN[dtype]
    return torch.full(tuple(shape), word, dtype=held).view(dtype)


def bits(x: Tensor) -> Tensor:
    """The bits of `x` as ints; every NaN that is not poison counts as one."""
    if x.dtype not in POISON_NAN:
        return x
    held, word = POISON_NAN[x.dtype]
    found = x.contiguous().view(held)
    return torch.where(x.isnan() & (found != word), torch.full_like(found, -1), found)


def _normal(shape: tuple[int, ...], amount: float, g: torch.Generator) -> Tensor:
    return amount * torch.randn(shape, generator=g)


def _positive(shape: tuple[int, ...], amount: float, g: torch.Generator) -> Tensor:
    return amount * (0.5 + torch.rand(shape, generator=g))


def _words(shape: tuple[int, ...], amount: float, g: torch.Generator) -> Tensor:
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=g)


def _zeros(shape: tuple[int, ...], amount: float, g: torch.Generator) -> Tensor:
    return torch.zeros(shape)


FILLS = {"normal": _normal, "positive": _positive, "words": _words, "zeros": _zeros}


def filled(argument: Json, seed: int) -> Tensor:
    """The tensor that a "fill" describes; its elements repeat after `FILL_BLOCK`."""
    shape, dtype = tuple(argument["shape"]), getattr(torch, argument["dtype"])
    count = math.prod(shape)
    draw = FILLS[argument["fill"]]
    generator = torch.Generator().manual_seed(seed)
    block = draw((min(count, FILL_BLOCK),), argument["amount"], generator).to(dtype)
    out = torch.empty(count, dtype=dtype)
    whole = count // FILL_BLOCK * FILL_BLOCK
    if whole:
        out[:whole].view(-1, FILL_BLOCK)[:] = block
    out[whole:] = block[: count - whole]
    return out.view(shape)


def as_argument(x: Tensor, words: bool) -> Any:
    """A tensor as kernels take it; it shares and keeps alive the memory."""
    return tvm_ffi.from_dlpack(x.view(torch.uint32) if words else x)


# The gate


class Wrong(Exception):
    """A result differs from the reference."""


class Guarded(NamedTuple):
    """A copy of a tensor amid poison, and all of that memory as it should be afterwards."""

    memory: Tensor
    view: Tensor
    expected: Tensor
    expected_view: Tensor


def guarded(x: Tensor, after: Tensor | None, device: str) -> Guarded:
    """`x` with its strides, in memory of its own; `after` is what the call leaves in it."""
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) if x.numel() else 0
    guard = GUARD_BYTES // x.element_size()
    memory = poisoned((span + 2 * guard,), x.dtype).to(device)
    views = []
    for held, content in ((memory, x), (memory.clone(), x if after is None else after)):
        view = held.as_strided(x.shape, x.stride(), guard)
        view.copy_(content)
        views += [held, view]
    return Guarded(*views)


def relative_l2(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in float64; of nothing but zeros, the error itself."""
    found, expected = found.double(), expected.double()
    norm: float = expected.norm().item()
    error: float = (found - expected).norm().item()
    return error / (norm or 1.0)


def _close_values(found: list[Tensor]) -> list[Tensor]:
    """What is compared: one tensor itself; of partial results the output and log-sum-exp."""
    if len(found) == 1:
        return [found[0].double()]
    acc, stat = (x.double() for x in found)
    top, total = stat.unbind(-1)
    return [acc / total[..., None], (top + total.log2()) * math.log(2)]


def _check_close(rule: Json, held: list[Guarded | None]) -> tuple[float, float]:
    """Error and limit of the group that comes closest to its limit; marks all as compared."""
    kept = [each for i in rule["of"] if (each := held[i]) is not None]
    group = rule["group"]
    found = _close_values([each.view.cpu() for each in kept])
    worst = (0.0, max(rule["limits"], default=0.0))
    for number, limit in enumerate(rule["limits"]):
        where = group == number
        for values, expected in zip(found, rule["expected"]):
            error = relative_l2(values[where], expected[where])
            if not error <= limit:
                raise Wrong(f"relative L2 error {error:.2e} above {limit:.0e}, group {number}")
            if error / limit > worst[0] / worst[1]:
                worst = (error, limit)
    compared = group != UNTOUCHED
    for each in kept:
        mask = compared.to(each.view.device)
        each.expected_view[mask] = each.view[mask]
    return worst


def check_call(kernel: Kernel, call: Json, device: str) -> tuple[float, float]:
    """Run one call of the check; its error and limit, 0 where bits are compared.

    Raises
    ------
    Wrong
        A result or any other memory is not what it should be.
    """
    arguments = call["arguments"]
    held = [None if "scalar" in a else guarded(a["tensor"], a["after"], device) for a in arguments]
    kernel(
        *(
            a["scalar"] if each is None else as_argument(each.view, a["words"])
            for a, each in zip(arguments, held)
        )
    )
    if device == "cuda":
        torch.cuda.synchronize()
    return judge(call, held)


def judge(call: Json, held: list[Guarded | None]) -> tuple[float, float]:
    """Compare what a call left in its arguments (None: a number) with what it should have left.

    Raises
    ------
    Wrong
        Something differs.
    """
    errors = [_check_close(rule, held) for rule in call["close"]]
    for number, each in enumerate(held):
        if each is None:
            continue
        wrong = bits(each.memory) != bits(each.expected)
        if wrong.any():
            raise Wrong(f"argument {number}: {int(wrong.sum())} elements differ")
    return max(errors, key=lambda e: e[0] / (e[1] or 1), default=(0.0, 0.0))


# Timing


def cache_bytes(device: str, root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the device's last cache; 32 MiB where the system does not say."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [0]
    for path in root.glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 10, "M": 20}.get(text[-1:], 0)
        sizes.append(int(text.rstrip("KM")) << unit)
    return max(sizes) or FALLBACK_CACHE_BYTES


def copies_of(nbytes: int, cache: int) -> int:
    """How many copies of a call's cold memory exceed the cache, within `COPIES_BYTES`."""
    wanted = math.ceil(COLD_FACTOR * cache / max(1, nbytes))
    return max(1, min(max(2, wanted), MAX_COPIES, COPIES_BYTES // max(1, nbytes)))


class TimedCall:
    """One call of a case on rotated copies of its cold memory."""

    def __init__(self, call: Json, device: str) -> None:
        self.weight = float(call["weight"])
        self.device = device
        tensors = [_timed_tensor(a, i, device) for i, a in enumerate(call["arguments"])]
        cold = [t for t, a in zip(tensors, call["arguments"]) if t is not None and a["cold"]]
        count = copies_of(sum(t.nbytes for t in cold), cache_bytes(device)) if cold else 1
        self.rows = [self._row(call["arguments"], tensors, n > 0) for n in range(count)]
        self.next = 0
        self.graphs: dict[Kernel, torch.cuda.CUDAGraph] = {}

    @staticmethod
    def _row(arguments: list[Json], tensors: list[Tensor | None], copy: bool) -> tuple[Any, ...]:
        return tuple(
            a["scalar"]
            if t is None
            else as_argument(t.clone() if copy and a["cold"] else t, a["words"])
            for a, t in zip(arguments, tensors)
        )

    def run(self, kernel: Kernel, calls: int) -> list[float]:
        """Microseconds of so many calls, each on the next copy.

        On a GPU of at least as many, by graphs that go through all copies: an entry is a graph's
        mean, without what it takes to launch a kernel from the host.
        """
        if self.device == "cuda":
            captured = len(self._captured)
            times = _event_times(self._graph(kernel).replay, math.ceil(calls / captured))
            return [us / captured for us in times]
        rows = [self.rows[(self.next + i) % len(self.rows)] for i in range(calls)]
        self.next += calls
        return _cpu_times(kernel, rows)

    @property
    def _captured(self) -> list[tuple[Any, ...]]:
        """The copies that a graph calls a kernel on: all, again and again if they are few."""
        return self.rows * math.ceil(GRAPH_CALLS / len(self.rows))

    def _graph(self, kernel: Kernel) -> torch.cuda.CUDAGraph:
        """Captured calls of a kernel, after one that loads its code."""
        if kernel not in self.graphs:
            kernel(*self.rows[0])
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with tvm_ffi.use_torch_stream(torch.cuda.graph(graph)):
                for row in self._captured:
                    kernel(*row)
            self.graphs[kernel] = graph
        return self.graphs[kernel]


def _timed_tensor(argument: Json, seed: int, device: str) -> Tensor | None:
    if "scalar" in argument:
        return None
    found = filled(argument, seed) if "fill" in argument else argument["tensor"]
    return found.to(device)


def _cpu_times(kernel: Kernel, rows: Sequence[tuple[Any, ...]]) -> list[float]:
    clock = time.perf_counter_ns
    times = []
    for row in rows:
        start = clock()
        kernel(*row)
        times.append((clock() - start) / 1e3)
    return times


def _event_times(run: Callable[[], object], count: int) -> list[float]:
    """Microseconds of so many runs by CUDA events."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in events]


def waited_ns() -> int:
    """Nanoseconds for which threads of this process were ready and got no processor (Linux)."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            total += int(path.read_text().split()[1])
    return total


class Sample(NamedTuple):
    """The median of some calls, and the share of their time that others took from us.

    Who takes a processor from us does not slow a GPU: 0 there.
    """

    disturbed: float
    us: float


def sample(call: TimedCall, kernel: Kernel, calls: int) -> Sample:
    """Time so many calls."""
    before = waited_ns()
    times = call.run(kernel, calls)
    waited = 0 if call.device == "cuda" else waited_ns() - before
    return Sample(waited / (1e3 * sum(times)), statistics.median(times))


def time_call(call: TimedCall, kernel: Kernel) -> list[float]:
    """Medians of samples that last `SAMPLED_US` in all, at least `SAMPLES`, after a warm-up.

    While other processes disturb, up to `MAX_ATTEMPTS` times as many are taken; those that were
    disturbed least count.
    """
    each, one = _calls_of_a_sample(call, kernel)
    wanted = max(SAMPLES, math.ceil(SAMPLED_US / (each * one)))
    taken: list[Sample] = []
    calm = 0
    while calm < wanted and len(taken) < MAX_ATTEMPTS * wanted:
        taken.append(sample(call, kernel, each))
        calm += taken[-1].disturbed <= DISTURBED
    least = sorted(range(len(taken)), key=lambda i: taken[i].disturbed)[:wanted]
    return [taken[i].us for i in sorted(least)]


def _calls_of_a_sample(call: TimedCall, kernel: Kernel) -> tuple[int, float]:
    """Warm up; how many calls make a sample, and the microseconds of one."""
    first = call.run(kernel, min(len(call.rows), WARM_CALLS) + 1)
    one = max(0.1, statistics.median_low(first))
    return math.ceil(SAMPLE_US / one), one


def calmest(call: TimedCall, kernel: Kernel, calls: int) -> float:
    """The first undisturbed of `MAX_ATTEMPTS` samples, or the one disturbed least."""
    taken: list[Sample] = []
    while len(taken) < MAX_ATTEMPTS:
        call.run(kernel, 1)
        taken.append(sample(call, kernel, calls))
        if taken[-1].disturbed <= DISTURBED:
            break
    return min(taken).us


def weighted(calls: Sequence[TimedCall], times: Sequence[list[float]]) -> list[float]:
    """Samples of the case from those of its calls."""
    return [sum(c.weight * t for c, t in zip(calls, row)) for row in zip(*times)]


def compare_kernels(
    calls: Sequence[TimedCall], kernels: Sequence[Kernel], rounds: int, at: Callable[[int], None]
) -> list[list[float]]:
    """One sample per round and kernel, kernel by kernel in turn, the order reversed every round.

    A neighbour that slows the machine for a while slows all kernels alike.
    """
    samples: list[list[float]] = [[] for _ in kernels]
    burst = [_calls_of_a_sample(call, kernels[0])[0] for call in calls]
    for number in range(rounds):
        for i in range(len(kernels))[:: -1 if number % 2 else 1]:
            at(i)
            total = 0.0
            for call, count in zip(calls, burst):
                total += call.weight * calmest(call, kernels[i], count)
            samples[i].append(total)
    return samples


def read_gb_per_s(device: str) -> float:
    """Best of several sums over memory far larger than the caches."""
    x = torch.ones(READ_BYTES // 4, device=device)
    times = _event_times(x.sum, 8) if device == "cuda" else _cpu_times(x.sum, [()] * 8)
    return READ_BYTES / min(times) / 1e3


# The worker


def runtime_library(suffix: str = "") -> Path:
    """TVM's runtime library: $KIVI_TVM_RUNTIME_LIBRARY, or beside the installed package tvm."""
    name = f"libtvm_runtime{suffix}." + ("dylib" if sys.platform == "darwin" else "so")
    given = os.environ.get("KIVI_TVM_RUNTIME_LIBRARY")
    if given:
        return Path(given).with_name(name)
    spec = PathFinder.find_spec("tvm")
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / "lib" / name
        if path.is_file():
            return path
    raise FileNotFoundError(f"{name} was not found; set KIVI_TVM_RUNTIME_LIBRARY")


class Session:
    """One loaded case on one device, and the requests about it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.case: Json = {}
        self.timed: list[TimedCall] = []
        self.running: int | None = None  # of a comparison's candidates
        for suffix in ("", "_cuda") if device == "cuda" else ("",):
            ctypes.CDLL(str(runtime_library(suffix)), mode=os.RTLD_GLOBAL)
        if device == "cuda":
            tvm_ffi.register_global_func("tvm_callback_cuda_compile", machine_code)

    def answer(self, request: Json, at: Callable[[int], None]) -> Json:
        """The answer to one request.

        What fails on a GPU leaves nothing there that a next candidate could run on: it raises.
        """
        self.running = None
        try:
            if request["do"] == "compare":
                return self._compare(request, at)
            found: Json = getattr(self, f"do_{request['do']}")(request)
            return found
        except Wrong as error:
            failure = _failure("wrong", str(error))
        except OSError as error:
            failure = _failure("load", str(error))
        except Exception as error:
            if self.device == "cuda":
                raise
            failure = _failure("crash", f"{type(error).__name__}: {error}")
        return failure | ({} if self.running is None else {"culprit": self.running})

    def _compare(self, request: Json, at: Callable[[int], None]) -> Json:
        """The samples of every library."""

        def begin(i: int) -> None:
            self.running = i
            at(i)

        kernels = []
        for self.running, path in enumerate(request["libraries"]):
            kernels.append(self._kernel(path))
        return {"times_us": compare_kernels(self._calls(), kernels, request["rounds"], begin)}

    def do_device(self, request: Json) -> Json:
        name, threads = device_name(self.device), _threads(self.device)
        return {"name": name, "kind": self.device, "threads": threads}

    def do_load(self, request: Json) -> Json:
        self.case, self.timed = torch.load(request["case"], weights_only=True), []
        if self.case["format"] != FORMAT:
            return _failure("load", f"`format` must be {FORMAT}, got {self.case['format']}")
        return {"function": self.case["function"], "nbytes": self.case["nbytes"]}

    def do_check(self, request: Json) -> Json:
        kernel = self._kernel(request["library"])
        errors = [check_call(kernel, call, self.device) for call in self.case["check"]]
        error, limit = max(errors, key=lambda e: e[0] / (e[1] or 1))
        return {"max_error": error, "error_limit": limit}

    def do_time(self, request: Json) -> Json:
        kernel = self._kernel(request["library"])
        times = [time_call(call, kernel) for call in self._calls()]
        return {"times_us": weighted(self.timed, times)}

    def do_bandwidth(self, request: Json) -> Json:
        return {"gb_per_s": read_gb_per_s(self.device)}

    def _kernel(self, path: str) -> Kernel:
        try:
            kernel: Kernel = tvm_ffi.load_module(path)[self.case["function"]]
        except (RuntimeError, AttributeError, KeyError) as error:
            raise OSError(f"cannot load {Path(path).name}: {error}") from error
        return kernel

    def _calls(self) -> list[TimedCall]:
        if not self.timed:
            self.timed = [TimedCall(call, self.device) for call in self.case["timed"]]
        return self.timed


def _failure(kind: str, message: str) -> Json:
    return {"failure": {"kind": kind, "message": message}}


def machine_code(source: str) -> bytes:
    """What TVM loads of a library compiled where there is no GPU: the code behind its source."""
    _, mark, code = source.partition(MACHINE_CODE)
    if not mark:
        raise RuntimeError("a CUDA source must carry its machine code: there is no compiler here")
    return base64.b64decode(code)


def _threads(device: str) -> int:
    return 0 if device == "cuda" else int(os.environ.get("TVM_NUM_THREADS", "1"))


def device_name(device: str) -> str:
    """What the vendor calls the device."""
    if device == "cuda":
        return str(torch.cuda.get_device_name(0))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown")


def serve(device: str) -> None:
    """Answer requests until stdin ends; what candidates print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(answer: Json) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    session = Session(device)
    send({"ready": True})
    for line in sys.stdin:
        send(session.answer(json.loads(line), lambda i: send({"at": i})))


# Whoever asks a worker


class WorkerFailed(Exception):
    """A worker ended ("crash") or gave no answer in time ("timeout"); it is gone."""

    def __init__(self, kind: str, message: str, at: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.at = at  # the last candidate of a comparison that was begun


class Worker:
    """A process that answers JSON lines; killed with all its children when it fails.

    Parameters
    ----------
    command : sequence of str
    environment : dict of str to str
    die_with_parent : bool
        Kill it when the thread that starts it ends (Linux); for programs with one thread.
    """

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], die_with_parent: bool = False
    ) -> None:
        # closed with the object: what a dead process wrote is read afterwards
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            start_new_session=True,
            preexec_fn=_die_with_parent if die_with_parent else None,
        )
        self._pending = b""

    def ask(self, request: Json, timeout_s: float | Callable[[], float]) -> Json:
        """The answer to a request.

        Parameters
        ----------
        request : dict
        timeout_s : float or callable
            Seconds, counted anew when a comparison goes on; or what gives the seconds that are
            left, asked again and again.

        Raises
        ------
        WorkerFailed
            The process ended or the time is over; it was killed.
        """
        assert self.process.stdin is not None
        self._stderr.seek(0)
        self._stderr.truncate()
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise self._failed("crash", None) from None
        return self.receive(timeout_s)

    def receive(self, timeout_s: float | Callable[[], float]) -> Json:
        """The next answer, progress left out."""
        start, at = time.monotonic(), None

        def left() -> float:
            if callable(timeout_s):
                return timeout_s()
            return start + timeout_s - time.monotonic()

        for line in self._lines(left):
            answer: Json = json.loads(line)
            if "at" not in answer:
                return answer
            start, at = time.monotonic(), answer["at"]
        raise self._failed("timeout" if left() <= 0 else "crash", at)

    def _lines(self, left: Callable[[], float]) -> Iterator[bytes]:
        """Lines until the process ends or no time is left."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while True:
                while b"\n" in self._pending:
                    line, _, self._pending = self._pending.partition(b"\n")
                    yield line
                if (wait := left()) <= 0:
                    return
                if selector.select(min(wait, 0.2)):
                    data = os.read(self.process.stdout.fileno(), 1 << 16)
                    if not data:
                        return
                    self._pending += data

    def _failed(self, kind: str, at: int | None) -> WorkerFailed:
        self.close(patience_s=1.0 if kind == "crash" else 0.0)
        status = self.process.returncode
        how = "no answer in time" if kind == "timeout" else _ending(status)
        tail = self.stderr_ends()
        return WorkerFailed(kind, f"{how}: {tail}" if tail else how, at)

    def stderr_ends(self) -> str:
        """How what the process wrote to stderr since the last request begins and ends.

        A crash's own backtrace comes last, what led to it first.
        """
        self._stderr.seek(0)
        text = self._stderr.read().replace(b"\0", b"").decode(errors="replace").strip()
        if len(text) <= 2 * END_CHARS:
            return text
        return f"{text[:END_CHARS]} ... {text[-END_CHARS:]}"

    def close(self, patience_s: float = 0.0) -> None:
        """End the process and all it started."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _ending(status: int | None) -> str:
    if status is None or status >= 0:
        return f"the process ended with status {status}"
    return f"the process was ended by {signal.Signals(-status).name}"


def _die_with_parent() -> None:
    """PR_SET_PDEATHSIG, Linux only."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def worker_environment(threads: int) -> dict[str, str]:
    """The variables of a worker whose kernels use so many threads, as the runtime sets them."""
    return {
        **os.environ,
        "TVM_NUM_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "TVM_BIND_THREADS": "0",
        "TVM_THREAD_POOL_SPIN_COUNT": "1000",
    }


def serve_command(device: str) -> list[str]:
    """The command that starts a worker; -P: the script's folder is no place to import from."""
    return [sys.executable, "-P", str(Path(__file__).resolve()), "serve", "--device", device]


# Detached measuring


class Batch:
    """The candidates of a folder, each measured in a worker that it can only end for itself."""

    def __init__(self, folder: Path, device: str | None, threads: int, timeout_s: float) -> None:
        self.folder, self.timeout_s = folder, timeout_s
        self.content: Json = json.loads((folder / "candidates.json").read_text())
        if not self.content["complete"]:
            raise SystemExit(f"{folder}: emitting was cut off; run `kivi-tvm tune --emit` again")
        self.device = device or self.content["device"]
        self.environment = worker_environment(threads)
        self.worker: Worker | None = None
        self.case = ""

    def run(self) -> None:
        """Measure what has no result yet."""
        with (self.folder / RESULTS).open("a+b") as out:
            _lock(out)
            lines = _whole_lines(out)
            if lines:
                self._check_header(lines[0])
            else:
                put(out, self._header())
            done = {line["id"]: line for line in lines if "id" in line}
            compared = {line["task"] for line in lines if "task" in line}
            for task, candidates in self._tasks().items():
                for each in candidates:
                    if each["id"] not in done:
                        done[each["id"]] = put(out, self._timed(self._measure, each))
                if task not in compared:
                    found = [(each, done[each["id"]]) for each in candidates]
                    put(out, self._timed(self._compare, found))
        if self.worker is not None:
            self.worker.close()

    def _tasks(self) -> dict[str, list[Json]]:
        found: dict[str, list[Json]] = {}
        for candidate in self.content["candidates"]:
            if candidate["library"] is not None:
                found.setdefault(candidate["task"], []).append(candidate)
        return found

    def _header(self) -> Json:
        names = ("torch", "apache-tvm", "apache-tvm-ffi", "numpy")
        return {
            "folder": self.content["checksum"],
            "device": self._ask({"do": "device"}),
            "read_gb_per_s": self._ask({"do": "bandwidth"})["gb_per_s"],
            "versions": {name: _version(name) for name in names},
        }

    def _check_header(self, header: Json) -> None:
        """Only the same candidates on the same device go on where others ended."""
        device = self._ask({"do": "device"})
        for name, found in (("folder", self.content["checksum"]), ("device", device)):
            if header.get(name) != found:
                raise SystemExit(
                    f"{RESULTS} is of another {name} ({header.get(name)}, here {found}): "
                    "move it away to begin anew"
                )

    def _timed(self, measure: Callable[[Any], Json], what: Any) -> Json:
        start = time.monotonic()
        return {**measure(what), "seconds": round(time.monotonic() - start, 3)}

    def _measure(self, candidate: Json) -> Json:
        library = candidate["library"]
        try:
            found = self._load(candidate["case"])
            if "failure" not in found:
                found = self._altered(library) or {}
            for do in ("check", "time"):
                if "failure" not in found:
                    found |= self._ask({"do": do, "library": self._path(library)})
        except WorkerFailed as error:
            found = _failure(error.kind, str(error))
        kept = ("failure",) if "failure" in found else ("times_us", "max_error", "error_limit")
        return {"id": candidate["id"], **{name: found[name] for name in kept}}

    def _compare(self, found: list[tuple[Json, Json]]) -> Json:
        """The defaults and the best of a task in turn; who fails drops out."""
        right = [(each, line["times_us"]) for each, line in found if "times_us" in line]
        best = sorted((c for c in right if c[0]["decisions"]), key=lambda c: _median(c[1]))
        left = [c for c, _ in right if not c["decisions"]] + [c for c, _ in best[:FINALISTS]]
        compared: Json = {}
        failed: Json = {}
        while left:
            rounds = self.content["rounds"]
            libraries = [self._path(each["library"]) for each in left]
            request = {"do": "compare", "libraries": libraries, "rounds": rounds}
            try:
                self._load(left[0]["case"])
                answer = self._ask(request)
            except WorkerFailed as error:
                answer = _failure(error.kind, str(error)) | {"culprit": error.at or 0}
            if "failure" not in answer:
                compared = {e["id"]: times for e, times in zip(left, answer["times_us"])}
                break
            failed[left.pop(answer["culprit"])["id"]] = answer["failure"]
        return {"task": found[0][0]["task"], "compared": compared, "failed": failed}

    def _load(self, case: str) -> Json:
        """Make the worker hold a case; a failure if it cannot."""
        if self.worker is not None and self.case == case:
            return {}
        self.case = ""
        found = self._altered(case) or self._ask({"do": "load", "case": self._path(case)})
        if "failure" not in found:
            self.case = case
        return found

    def _altered(self, name: str) -> Json | None:
        """A failure where a file is not the one that was emitted."""
        try:
            if sha256(self.folder / name) == self.content["files"].get(name):
                return None
        except OSError as error:
            return _failure("load", str(error))
        return _failure("load", f"{name} is not the file that was emitted (SHA-256)")

    def _path(self, name: str) -> str:
        return str((self.folder / name).resolve())

    def _ask(self, request: Json, timeout_s: float | None = None) -> Json:
        try:
            if self.worker is None:
                self.case = ""
                self.worker = Worker(serve_command(self.device), self.environment, True)
                self.worker.receive(START_TIMEOUT_S)
            return self.worker.ask(request, timeout_s or self.timeout_s)
        except WorkerFailed:
            self.worker = None
            raise


def sha256(path: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def line_checksum(line: Json) -> str:
    """Of a line of results, its own "checksum" left out."""
    content = {name: value for name, value in line.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def put(out: IO[bytes], line: Json) -> Json:
    """Append one line, which a crash afterwards cannot take back."""
    out.write(json.dumps({**line, "checksum": line_checksum(line)}).encode() + b"\n")
    out.flush()
    os.fsync(out.fileno())
    return line


def parse_results(data: bytes) -> list[Json]:
    """The lines of results; half a line at the end is left out.

    Raises
    ------
    ValueError
        A line is damaged.
    """
    found = []
    for number, text in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            line = json.loads(text)
            intact = line["checksum"] == line_checksum(line)
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise ValueError(f"line {number} of {RESULTS} is damaged")
        found.append(line)
    return found


def _whole_lines(out: IO[bytes]) -> list[Json]:
    """What earlier runs finished; half a line at the end is cut off."""
    out.seek(0)
    data = out.read()
    try:
        lines = parse_results(data)
    except ValueError as error:
        raise SystemExit(f"{error}: move the file away to begin anew") from error
    out.truncate(data.rfind(b"\n") + 1)
    return lines


def _lock(out: IO[bytes]) -> None:
    """Keep a second batch out, where the file system can."""
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"another process is writing {RESULTS}") from None
    except OSError:
        return


def _median(times: Sequence[float]) -> float:
    return statistics.median_low(times)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Check and time compiled candidates.")
    parser.add_argument("mode", choices=("serve", "batch"))
    parser.add_argument("folder", type=Path, nargs="?", default=Path())
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: as emitted, or cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds per request")
    given = parser.parse_args()
    if given.mode == "serve":
        serve(given.device or "cpu")
    else:
        try:
            Batch(given.folder, given.device, given.threads, given.timeout).run()
        except WorkerFailed as error:
            raise SystemExit(f"nothing can be measured here: {error}") from error


if __name__ == "__main__":
    main()
