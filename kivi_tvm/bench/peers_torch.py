"""Decode attention by torch on an unquantized cache: every way that is known, in three dtypes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kivi_tvm.bench.provider import HALF, PEER_TOLERANCES, WIDE, Peer, Provider, Setting
from kivi_tvm.workloads import Workload

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def grouped_matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Matmul, softmax, matmul with the `M` query heads of a KV head as rows, scale on `q`.

    `[B, H_kv, M, D] @ [B, H_kv, D, T]`, plus `mask [B, 1, 1, T]`, softmax, `@ [B, H_kv, T, D]`.
    """
    B, _, D = q.shape
    rows = q.view(B, k.shape[1], -1, D) * D**-0.5
    scores = rows @ k.mT
    return torch.softmax(scores if mask is None else scores.add_(mask), -1) @ v


def sdpa_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`scaled_dot_product_attention` with the `M` query heads of a KV head as query rows."""
    B, _, D = q.shape
    rows = q.view(B, k.shape[1], -1, D)
    # The kernel wants a mask of every query row.
    wide = None if mask is None else mask.expand(-1, -1, rows.shape[2], -1)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=wide)


def sdpa_gqa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`scaled_dot_product_attention(enable_gqa=True)`, what transformers calls."""
    return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, enable_gqa=True)


ALGORITHMS: dict[str, Attention] = {
    "torch-matmul": grouped_matmul,
    "torch-sdpa-rows": sdpa_rows,
    "torch-sdpa-gqa": sdpa_gqa,
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def cache_bytes(w: Workload, dtype: torch.dtype) -> int:
    """Keys and values of `T + 1` tokens, read once; ragged rows are padded to the longest."""
    tokens = max(w.row_lengths) + 1
    return 2 * w.batch_size * w.num_kv_heads * tokens * w.head_dim * dtype.itemsize


def _mask(setting: Setting, dtype: torch.dtype) -> Tensor | None:
    """`[B, 1, 1, T]`, minus infinity where a row has no token; None if all are equally long."""
    if len(set(setting.lengths)) == 1:
        return None
    positions = torch.arange(max(setting.lengths))
    outside = positions >= torch.tensor(setting.lengths)[:, None]
    return torch.zeros(outside.shape, dtype=dtype).masked_fill_(outside, -torch.inf)[:, None, None]


def _copies(setting: Setting, dtype: torch.dtype, count: int) -> list[tuple[Tensor, Tensor]]:
    k, v = setting.keys.to(dtype), setting.values.to(dtype)
    return [(k.clone(), v.clone()) for _ in range(count)]


def _make(name: str, algorithm: Attention, dtype: torch.dtype, setting: Setting) -> Provider:
    q, nbytes = setting.inputs.q[0].to(dtype), cache_bytes(setting.w, dtype)
    count = setting.copies(nbytes)
    made = partial(_copies, setting, dtype, count)
    # Two copies in turn are each larger than L3: algorithms may share them, long caches must.
    caches = setting.once((dtype, "copies"), made) if count <= 2 else made()
    mask = _mask(setting, dtype)
    return Provider(
        name=name,
        source="peer",
        calls=[partial(algorithm, q, k, v, mask) for k, v in caches],
        nbytes=nbytes,
        expected=setting.once((dtype, "exact"), lambda: setting.exact(q, *caches[0])),
        tolerance=PEER_TOLERANCES[dtype],
        kind=WIDE if dtype == torch.float32 else HALF,
        padded=mask is not None,
    )


def _peer(algorithm: str, slug: str) -> Peer:
    name, dtype = f"{algorithm}-{slug}", DTYPES[slug]
    kind = WIDE if dtype == torch.float32 else HALF
    make = partial(_make, name, ALGORITHMS[algorithm], dtype)
    # bfloat16 is the faster of the 16-bit types in every way; `--peers` adds float16.
    return Peer(name, kind, make, default=slug != "fp16")


PEERS = [_peer(algorithm, slug) for algorithm in ALGORITHMS for slug in DTYPES]
