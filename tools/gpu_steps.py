"""Measure a layer's decode step on an NVIDIA GPU: one line of JSON per case.

    python tools/gpu_steps.py docs/gpu-h100.jsonl --commit $(git rev-parse --short HEAD)

needs torch with CUDA, nvcc and no network. A decode step (append, attend, combine) is compared
with PyTorch's attention on a 16-bit cache that has its last token written, the best of its
backends. Both run in CUDA graphs of 32 layers, as those of models are, or so many more that their
caches exceed the L2 cache, but at most 64 and 35 GB of 16-bit caches: packed caches of 1k tokens of
one sequence may stay in it ("layers" says how many there were). The first layer's output is
compared with float64 attention on the same codes before any is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kivi_tvm import KiviConfig, build
from kivi_tvm.host import installed_version
from kivi_tvm.runtime.cache import Cache
from kivi_tvm.tune.measure import relative_l2

D = 128
HEADS = ((32, 8), (32, 4), (32, 32))
SIZES = (
    *((1, n) for n in (1024, 4096, 32768, 131072)),
    *((8, n) for n in (1024, 4096, 32768)),
    *((32, n) for n in (1024, 8192)),
    (256, 330),  # most bytes are those of the window
)
SETTINGS = ((2, 32), (2, 128), (4, 32))  # bits, group size
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
CACHED_BYTES = 35 * 10**9  # of one case's 16-bit caches, at most, and of half the GPU's memory
ROTATED_BYTES = 256 << 20  # of packed caches if possible, so that they exceed any L2 cache
LAYERS, MAX_LAYERS = 32, 64
CASE_BYTES = 2 << 30  # of one layer of a case, at most
TOLERANCE = 5e-3
REPEATS, FEW_REPEATS = 20, 6  # replays of what is reported, and of what is chosen from
WARM_UP_S = 0.2

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """One shape and setting."""

    heads: int
    kv_heads: int
    bits: int
    group_size: int
    batch: int
    tokens: int

    @property
    def config(self) -> KiviConfig:
        return KiviConfig(
            D, self.heads, self.kv_heads, self.bits, self.bits, group_size=self.group_size
        )

    @property
    def packed_bytes(self) -> int:
        """Bytes that attention reads of packed tokens: codes, scales and zeros."""
        bits = self.bits + 32 / self.group_size
        return int(2 * self.batch * self.tokens * self.kv_heads * D * bits / 8)

    @property
    def full_bytes(self) -> int:
        return 4 * self.batch * self.tokens * self.kv_heads * D

    @property
    def layers(self) -> int:
        """As a model has, or enough to exceed an L2 cache, within memory."""
        wanted = max(LAYERS, -(-ROTATED_BYTES // self.packed_bytes))
        room = min(CACHED_BYTES, torch.cuda.mem_get_info()[1] // 2)
        return max(1, min(wanted, MAX_LAYERS, room // self.full_bytes))


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """A graph of a call, which ran once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def warm_up(graph: torch.cuda.CUDAGraph) -> None:
    """Replay a graph that may be replayed at will until a GPU that was idle is at full speed."""
    end = time.monotonic() + WARM_UP_S
    while time.monotonic() < end:
        graph.replay()
        torch.cuda.synchronize()


def replay_us(graph: torch.cuda.CUDAGraph, count: int, repeats: int = REPEATS) -> float:
    """Median time of a replay, microseconds, divided by `count`."""
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / count)
    return float(statistics.median(times[2:]))


def graph_us(call: Call, count: int) -> float:
    """Median time of a captured call that keeps nothing, microseconds, divided by `count`."""
    graph = captured(call)
    warm_up(graph)
    return replay_us(graph, count)


def drawn(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Normal numbers on the GPU."""
    return torch.randn(*shape, dtype=dtype, device="cuda")


def peer_us(case: Case) -> tuple[float, str]:
    """Time per layer of PyTorch's attention after its cache was written, and the backend."""
    shape = case.batch, case.kv_heads, case.tokens, D
    layers = [(drawn(*shape), drawn(*shape)) for _ in range(case.layers)]
    q, new = drawn(case.batch, case.heads, 1, D), drawn(case.batch, case.kv_heads, D)
    grouped = q.view(case.batch, case.kv_heads, -1, D)  # query heads of a KV head as rows
    ways = [(grouped, False)] if case.heads == case.kv_heads else [(q, True), (grouped, False)]
    found: list[tuple[float, str, torch.cuda.CUDAGraph]] = []
    for backend in BACKENDS:
        for query, gqa in ways:

            def step(query: torch.Tensor = query, gqa: bool = gqa) -> None:
                for k, v in layers:
                    k[:, :, -1], v[:, :, -1] = new, new
                    scaled_dot_product_attention(query, k, v, enable_gqa=gqa)

            with suppress(RuntimeError), sdpa_kernel(backend):  # a backend may not take it
                graph = captured(step)
                if not found:
                    warm_up(graph)
                found.append((replay_us(graph, case.layers, FEW_REPEATS), backend.name, graph))
    _, name, fastest = min(found, key=lambda each: each[0])
    return replay_us(fastest, case.layers), name


def filled(config: KiviConfig, layers: int, batch: int, tokens: int) -> Cache:
    """A cache with random tokens in every layer."""
    cache = build(config, "cuda").new_cache(num_layers=layers, batch_size=batch, device="cuda")
    shape, dtype = (batch, config.H_kv, tokens, config.D), getattr(torch, config.dtype)
    cache.begin(tokens)
    for i in range(layers):
        cache.layer(i).prefill(drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype))
    return cache


def error_of(cache: Cache) -> float:
    """Relative L2 error of the first layer's step against float64 attention on what it stored."""
    cfg, batch = cache.cfg, len(cache.lengths)
    dtype = getattr(torch, cfg.dtype)
    q, new = (drawn(batch, heads, cfg.D, dtype=dtype) for heads in (cfg.H, cfg.H_kv))
    cache.begin(1)
    outputs: list[Any] = [layer.decode(q, new, new) for layer in cache.layers]
    k, v = cache.layer(0).dequantize()
    k, v, q = k[:1].double(), v[:1].double(), q[:1].double()
    want = scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=cfg.M > 1)
    return relative_l2(outputs[0][:1].double(), want[:, :, 0])


def ours_us(cache: Cache, case: Case) -> tuple[float, float]:
    """Time per layer of a whole step, and of `attend` alone."""
    q, new = drawn(case.batch, case.heads, D), drawn(case.batch, case.kv_heads, D)
    out, kernels, space = torch.empty_like(q), cache.kernels, cache.workspace
    scale = D**-0.5

    def step() -> None:
        cache.begin(1)
        for i in range(case.layers):
            cache.layer(i).decode(q, new, new, out=out)

    def attend() -> None:
        for i in range(case.layers):
            arguments = cache.layer(i)._attend_args
            kernels["attend"](*arguments, space.work, q, scale, *space.parts)

    steps, attends = captured(step), captured(attend)
    warm_up(attends)  # every step adds a token
    alone = replay_us(attends, case.layers)
    return replay_us(steps, case.layers), alone


def driver() -> str:
    """Version of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


def copy_gb_per_s() -> float:
    """Bandwidth of copying 1 GiB: bytes read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(source)
    return 2 * (1 << 30) / graph_us(lambda: copy.copy_(source), 1) / 1e3


def cases() -> Iterator[list[Case]]:
    """Every case whose 16-bit cache fits: those with the same peer together."""
    for (heads, kv_heads), (batch, tokens) in product(HEADS, SIZES):
        found = [Case(heads, kv_heads, *setting, batch, tokens) for setting in SETTINGS]
        if found[0].full_bytes <= CASE_BYTES:
            yield found


def configs() -> Iterator[KiviConfig]:
    """Every cache that is measured."""
    return (case.config for case in chain.from_iterable(cases()))


def build_all(configs: Iterable[KiviConfig]) -> None:
    """Compile the kernels of all configurations side by side: each has a compiler of its own."""
    by_kernels = {config.kernel_key(): config for config in configs}
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        list(pool.map(_build, by_kernels.values()))


def _build(config: KiviConfig) -> None:
    build(config, "cuda")


def measured(case: Case, bandwidth: float, peer: float, backend: str) -> dict[str, object]:
    """Error and times of one case, beside its peer's."""
    # its next token is the last one of the case
    cache = filled(case.config, case.layers, case.batch, case.tokens - 1)
    error = error_of(cache)
    found: dict[str, object] = {"error": error, "passed": error <= TOLERANCE}
    if error <= TOLERANCE:
        step, attend = ours_us(cache, case)
        rate = case.packed_bytes / attend / 1e3
        found |= {
            "step_us": round(step, 2), "attend_us": round(attend, 2),
            "peer_us": round(peer, 2), "peer": backend, "speedup": round(peer / step, 3),
            "attend_gb_per_s": round(rate, 1), "share_of_copy": round(rate / bandwidth, 3),
            "compute": cache.module.manifest["compute"],
            "source": cache.module.manifest["sources"]["attend"],
        }  # fmt: skip
    return found


def arguments(about: str | None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("output", type=Path, help="JSONL file to write")
    parser.add_argument("--commit", required=True, help="what is measured")
    return parser.parse_args()


def environment_of(commit: str, *names: str) -> dict[str, object]:
    """Where and of what the figures are, with the versions of distributions."""
    return {
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "driver": driver(),
        "versions": {name: installed_version(name) for name in names},
        "commit": commit,
    }


def main() -> None:
    """Write one line per case."""
    args = arguments(__doc__)
    environment = environment_of(args.commit, "kivi-tvm", "apache-tvm", "apache-tvm-ffi", "torch")
    build_all(configs())
    with args.output.open("w", encoding="utf-8") as file:
        for together in cases():
            bandwidth, peer = copy_gb_per_s(), peer_us(together[0])
            for case in together:
                fields = {name: getattr(case, name) for name in case.__slots__} | {
                    "layers": case.layers, "copy_gb_per_s": round(bandwidth, 1),
                }  # fmt: skip
                record = fields | measured(case, bandwidth, *peer) | environment
                print(json.dumps(record), file=file, flush=True)
                print({x: y for x, y in record.items() if x not in environment}, flush=True)


if __name__ == "__main__":
    main()
