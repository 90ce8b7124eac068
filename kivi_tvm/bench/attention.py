"""Decode attention of one layer: the compiled cache beside torch on an unquantized one.

Ours is the whole `decode` call (append, attend, combine, state), the peers compute attention on
tensors that already hold the new token: the comparison never favours us.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from kivi_tvm import layout
from kivi_tvm.bench import harness, peers
from kivi_tvm.bench.harness import Timing
from kivi_tvm.bench.provider import Provider
from kivi_tvm.bench.record import Environment, Record
from kivi_tvm.config import KiviConfig
from kivi_tvm.database import Found
from kivi_tvm.reference import ReferenceCache
from kivi_tvm.runtime.module import Module, build, build_with
from kivi_tvm.tune.cases.tolerance import limit
from kivi_tvm.tune.measure import cache_bytes
from kivi_tvm.workloads import Inputs, Workload, make_inputs

READ = "read"


def kivi_bytes(cfg: KiviConfig, lengths: Sequence[int]) -> int:
    """Bytes that `attend` must read: tokens whose key and value are packed, and the windows."""
    total = 0
    for length in lengths:
        pages = layout.page_buffers(cfg, layout.num_pages(cfg, layout.packed_values(cfg, length)))
        total += sum(buffer.nbytes for buffer in pages.values())
        window = 2 * cfg.H_kv * min(length, cfg.R) * cfg.D
        total += window * layout.DTYPE_BYTES[cfg.dtype]
    return total


def modules(cfg: KiviConfig, target: str) -> dict[str, Module]:
    """What is built for users, and beside it the default schedules if that is tuned."""
    from kivi_tvm import targets

    built = {"kivi-tvm": build(cfg, target)}
    if "tuned" in built["kivi-tvm"].manifest["sources"].values():
        built["kivi-tvm-default"] = build_with(cfg, targets.resolve(target), Found())
    return built


def ours(name: str, module: Module, w: Workload, inputs: Inputs, copies: int) -> Provider:
    """`decode` of `copies` compiled caches; every call makes its cache one token longer."""
    q, k_new, v_new = inputs.q[0], inputs.k_new[0], inputs.v_new[0]
    expected = ReferenceCache(w.cfg, w.batch_size)
    expected.prefill(inputs.k, inputs.v, inputs.lengths)
    calls = []
    for _ in range(copies):
        cache = module.new_cache(num_layers=1, batch_size=w.batch_size)
        cache.prefill(inputs.k, inputs.v, lengths=inputs.lengths)
        calls.append(partial(cache.decode, q, k_new, v_new))
    nbytes = kivi_bytes(w.cfg, [length + 1 for length in w.row_lengths])
    return Provider(
        name=name,
        source=module.manifest["sources"]["attend"],
        calls=calls,
        nbytes=nbytes,
        expected=expected.decode(q, k_new, v_new),
        tolerance=limit(getattr(torch, w.dtype), compute=module.manifest["compute"]),
    )


def compare(
    w: Workload, providers: Sequence[Provider], state: str, rounds: int, target: str
) -> list[Record]:
    """Check every provider, then time those that passed, interleaved with a bandwidth test."""
    errors = {provider.name: provider.check() for provider in providers}
    cases = {each.name: each.calls for each in providers if errors[each.name] <= each.tolerance}
    timings = harness.interleave({**cases, READ: harness.read_case()}, rounds)
    read_gb_per_s = timings[READ].gb_per_s(harness.READ_BUFFER_BYTES)
    environment = Environment.current()

    def record(provider: Provider) -> Record:
        timing: Timing | None = timings.get(provider.name)
        return Record(
            op="decode_attention",
            workload=w.id,
            tokens=w.tokens,
            provider=provider.name,
            source=provider.source,
            target=target,
            state=state,
            error=errors[provider.name],
            tolerance=provider.tolerance,
            bytes=provider.nbytes,
            timing=timing,
            read_gb_per_s=round(read_gb_per_s, 3),
            environment=environment,
        )

    return [record(provider) for provider in providers]


def run(
    w: Workload,
    state: str = "cold",
    peer_names: Sequence[str] = tuple(peers.DEFAULT_PEERS),
    rounds: int = 10,
    target: str = "native",
) -> list[Record]:
    """Benchmark workload `w` with the caches in `state`.

    Parameters
    ----------
    w : Workload
        Rows of equal length.
    state : str
        "cold": in turn over copies larger than the last-level cache; "warm": one copy.
    peer_names : sequence of str
        Names in `peers.PEERS`.
    rounds : int
        Each gives four samples per provider.
    target : str

    Returns
    -------
    list of Record
        Ours first: as built, and with default schedules if that is tuned. A record without a timing
        failed its check.
    """
    dtypes = {name: peers.parse(name)[1] for name in peer_names}
    inputs = make_inputs(w)
    l3 = cache_bytes("cpu")

    def copies(nbytes: int) -> int:
        return harness.copies_for(nbytes, state, l3)

    own_copies = copies(kivi_bytes(w.cfg, w.row_lengths))
    providers = [
        ours(name, module, w, inputs, own_copies) for name, module in modules(w.cfg, target).items()
    ]
    for name, dtype in dtypes.items():
        providers.append(peers.torch_peer(name, w, inputs, copies(peers.cache_bytes(w, dtype))))
    return compare(w, providers, state, rounds, target)
