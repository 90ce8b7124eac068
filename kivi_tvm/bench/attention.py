"""Decode attention of one layer: the compiled cache beside torch and other implementations.

Ours is the whole `decode` call (append, attend, combine, state), the peers compute attention on
tensors that already hold the new token, or store one: the comparison never favours us.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kivi_tvm.bench import harness, ours, peers
from kivi_tvm.bench.provider import Provider, Setting
from kivi_tvm.bench.record import Environment, Record
from kivi_tvm.tune.measure import cache_bytes
from kivi_tvm.workloads import Workload, make_inputs

READ = "read"


@dataclass(frozen=True, slots=True)
class Result:
    """Records of one workload in one state, and which default peers are missing, and why."""

    records: list[Record]
    left_out: dict[str, str]


def compare(
    w: Workload, providers: Sequence[Provider], state: str, rounds: int, target: str
) -> list[Record]:
    """Check every provider, then time those that passed, interleaved with a bandwidth test."""
    errors = {provider.name: provider.check() for provider in providers}
    cases = {each.name: each.calls for each in providers if errors[each.name] <= each.tolerance}
    timings = harness.interleave({**cases, READ: harness.read_case()}, rounds)
    read_gb_per_s = timings[READ].gb_per_s(harness.READ_BUFFER_BYTES)
    environment = Environment.current()
    return [
        Record(
            op="decode_attention",
            workload=w,
            provider=provider.name,
            kind=provider.kind,
            source=provider.source,
            compute=provider.compute,
            auto=provider.auto,
            padded=provider.padded,
            target=target,
            state=state,
            error=errors[provider.name],
            tolerance=provider.tolerance,
            bytes=provider.nbytes,
            timing=timings.get(provider.name),
            read_gb_per_s=round(read_gb_per_s, 3),
            environment=environment,
        )
        for provider in providers
    ]


def run(
    w: Workload,
    state: str = "cold",
    peer_names: Sequence[str] | None = None,
    compute: Sequence[str] | None = None,
    rounds: int = 10,
    target: str = "native",
) -> Result:
    """Benchmark workload `w` with the caches in `state`.

    Parameters
    ----------
    w : Workload
    state : str
        "cold": in turn over copies larger than the last-level cache; "warm": one copy.
    peer_names : sequence of str, optional
        Names in `peers.PEERS`; default those marked so that can run here.
    compute : sequence of str, optional
        Compute modes of ours; default all that the bits allow.
    rounds : int
        Each gives four samples per provider.
    target : str

    Returns
    -------
    Result
        Ours first: in each mode as built, and with default schedules if that is tuned. A record
        without a timing failed its check.

    Raises
    ------
    UserError
        A mode or a peer that was named cannot run.
    """
    peers.check(peer_names)
    setting = Setting(w, make_inputs(w), state, cache_bytes("cpu"))
    own = list(ours.providers(setting, compute, target))
    others, left_out = peers.make(setting, peer_names)
    return Result(compare(w, [*own, *others], state, rounds, target), left_out)
