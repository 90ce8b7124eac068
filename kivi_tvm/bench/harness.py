"""Timing on a noisy machine: interleaved cases, rotated caches, and the bandwidth of this minute.

Everything that is compared is timed in one run, a few calls of each case in turn, so that a busy
neighbour slows all of them. A loop over one small cache would measure the L3 cache: in state
"cold" a case is a list of calls on copies that together are several times larger than it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

STATES = ("warm", "cold")
# Copies must not survive a full turn: four times L3 also defeats a cache that is not strictly LRU.
COLD_FACTOR = 4
READ_BUFFER_BYTES = 512 << 20
# Workers of OpenVINO were seen to spin for 1.2 ms after a call.
SETTLE_S = 0.003

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """Percentiles of one case's calls in microseconds."""

    p20_us: float
    p50_us: float
    p80_us: float
    samples: int

    @classmethod
    def of(cls, times_us: Sequence[float]) -> Timing:
        """Percentiles of at least one sample, each a time that was really seen."""
        ordered = sorted(times_us)

        def at(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

        return cls(at(0.2), statistics.median_low(ordered), at(0.8), len(ordered))

    def gb_per_s(self, nbytes: int) -> float:
        """Rate at which the median call moves `nbytes`."""
        return nbytes / self.p50_us / 1e3


def copies_for(nbytes: int, state: str, cache_bytes: int) -> int:
    """How many copies of a case's `nbytes` a run rotates over.

    Raises
    ------
    ValueError
        `state` is not in `STATES`.
    """
    if state not in STATES:
        raise ValueError(f"`state` must be one of {list(STATES)}, got {state!r}")
    return 1 if state == "warm" else max(2, math.ceil(COLD_FACTOR * cache_bytes / max(1, nbytes)))


def interleave(
    cases: Mapping[str, Sequence[Call]],
    rounds: int,
    burst: int = 4,
    clock: Callable[[], int] = time.perf_counter_ns,
    sleep: Callable[[float], object] = time.sleep,
) -> dict[str, Timing]:
    """Time all cases in turn: per round `burst` timed calls of each, after one that is not timed.

    A pause and the untimed call let the threads of the previous case (workers spin for a while
    after their work) leave the cores, and wake those of this one. Every call takes the next copy of
    its case; all copies are called once before the first round. The order is reversed every second
    round.

    Parameters
    ----------
    cases : mapping of str to sequence of callables
        A case's calls do the same work on different copies of the data.
    rounds, burst : int
        `rounds * burst` samples per case.
    clock : callable
        Nanoseconds.
    sleep : callable
        Waits for some seconds.

    Returns
    -------
    dict of str to Timing
    """
    if rounds < 1 or burst < 1:
        raise ValueError(f"`rounds` and `burst` must be at least 1, got {rounds} and {burst}")
    position = dict.fromkeys(cases, 0)
    times: dict[str, list[float]] = {name: [] for name in cases}

    def run(name: str) -> float:
        calls = cases[name]
        call = calls[position[name] % len(calls)]
        position[name] += 1
        start = clock()
        call()
        return (clock() - start) / 1e3

    for name, calls in cases.items():
        for _ in calls:
            run(name)
    for number in range(rounds):
        for name in list(cases)[:: -1 if number % 2 else 1]:
            sleep(SETTLE_S)
            run(name)
            times[name] += [run(name) for _ in range(burst)]
    return {name: Timing.of(samples) for name, samples in times.items()}


def read_case(nbytes: int = READ_BUFFER_BYTES) -> list[Call]:
    """A case that reads `nbytes` once: torch's float32 sum on torch's threads.

    Its best rate was 4% below that of a hand-written AVX-512 read loop (21.8 and 22.8 GB/s, one
    loaded machine); a matrix-vector product reached 14. Time it beside the others: the rate
    changes from minute to minute.
    """
    buffer = torch.ones(nbytes // 4)
    return [buffer.sum]
