"""What each operation on a cache costs in time and bytes, beside the same on plain tensors.

Every call gets a subject of its own, made before the clock starts, since most operations change the
cache. The first call is checked, not timed: its result decides whether there will be a number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kivi_tvm import layout
from kivi_tvm.bench.harness import Timing
from kivi_tvm.bench.record import Environment
from kivi_tvm.runtime import Cache
from kivi_tvm.workloads import Workload

OURS = "kivi-tvm"


@dataclass(frozen=True, slots=True)
class Case:
    """One operation of one provider.

    Parameters
    ----------
    operation : str
        What a user calls, the same for ours and for the peer.
    provider : str
        "kivi-tvm", or the torch function that does the same to keys and values held in full.
    prepare : callable
        Makes the subject.
    call : callable
        Takes the subject; this is timed.
    check : callable
        Takes the subject and what the call returned: whether both are right.
    nbytes : callable
        Takes the same: bytes that the operation takes (or, below 0, gives back).
    """

    operation: str
    provider: str
    prepare: Callable[[], Any]
    call: Callable[[Any], Any]
    check: Callable[[Any, Any], bool]
    nbytes: Callable[[Any, Any], int]


@dataclass(frozen=True, slots=True)
class CacheRecord:
    """Time and bytes of one operation; `timing` is None if its result was wrong.

    `bytes` are pages, windows or tensors newly in use, negative if given back; for `save` those of
    the file.
    """

    operation: str
    workload: str
    tokens: int
    rollback: int
    provider: str
    target: str
    bytes: int
    timing: Timing | None
    environment: Environment

    @property
    def passed(self) -> bool:
        return self.timing is not None

    def to_dict(self) -> dict[str, object]:
        """Plain data on one level, without times for a wrong result."""
        fields: dict[str, object] = {"op": "cache_operation"} | asdict(self)
        del fields["timing"], fields["environment"]
        if self.timing is not None:
            fields |= asdict(self.timing)
        return fields | asdict(self.environment) | {"passed": self.passed}


def bytes_in_use(cache: Cache) -> int:
    """Bytes of the pages that rows own, each once, and of the windows of active rows."""
    cfg = cache.cfg
    page = sum(buffer.nbytes for buffer in layout.page_buffers(cfg, 1).values())
    windows = layout.ring_buffers(cfg, 1, cache.rollback, cache.window, cache.sink_tokens)
    row = sum(buffer.nbytes for buffer in windows.values())
    used: int = cache.report()["pages"]["used"]
    return cache.num_layers * (used * page + sum(cache.active) * row)


def measure(cases: Sequence[Case], rounds: int) -> list[tuple[int, Timing | None]]:
    """Bytes and times of every case, all in turn in each round."""
    found: list[tuple[int, list[float] | None]] = []
    for case in cases:
        subject = case.prepare()
        result = case.call(subject)
        right = case.check(subject, result)
        found.append((case.nbytes(subject, result), [] if right else None))
    for number in range(rounds):
        order = list(zip(cases, found, strict=True))
        for case, (_, times) in order[:: -1 if number % 2 else 1]:
            if times is not None:
                times.append(_time_us(case))
    return [(nbytes, Timing.of(times) if times else None) for nbytes, times in found]


def _time_us(case: Case) -> float:
    subject = case.prepare()
    start = time.perf_counter_ns()
    result = case.call(subject)
    elapsed = time.perf_counter_ns() - start
    del result  # not before the clock stops: a peer's copy takes long to free
    return elapsed / 1e3


def run(
    w: Workload, rollback: int | None = None, rounds: int = 10, target: str = "native"
) -> list[CacheRecord]:
    """Benchmark the operations on a cache of `w` and half a window more.

    Parameters
    ----------
    w : Workload
        `batch_size` of at least 2, rows of equal length.
    rollback : int, optional
        Of the cache; default one window.
    rounds : int
        Samples of every operation.
    target : str

    Returns
    -------
    list of CacheRecord
        For each operation ours, then the peer if there is one.

    Raises
    ------
    UserError
        The workload is too small for the operations.
    """
    from kivi_tvm.bench.cache_cases import ours
    from kivi_tvm.bench.cache_peers import peers
    from kivi_tvm.bench.cache_setup import Setup

    rollback = w.residual_length if rollback is None else rollback
    with TemporaryDirectory(prefix="kivi-tvm-bench-") as scratch:
        setup = Setup.make(w, rollback, target, Path(scratch))
        equal = {case.operation: case for case in peers(setup)}
        pairs = ((case, equal.get(case.operation)) for case in ours(setup))
        listed = [case for pair in pairs for case in pair if case is not None]
        measured = measure(listed, rounds)
    environment = Environment.current()
    return [
        CacheRecord(
            operation=case.operation,
            workload=w.id,
            tokens=w.tokens,
            rollback=rollback,
            provider=case.provider,
            target=target,
            bytes=nbytes,
            timing=timing,
            environment=environment,
        )
        for case, (nbytes, timing) in zip(listed, measured, strict=True)
    ]
