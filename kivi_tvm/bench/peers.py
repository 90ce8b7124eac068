"""The same decode attention by torch on an unquantized cache, each peer at its best."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kivi_tvm.bench.provider import PEER_TOLERANCES, Provider, exact_attention
from kivi_tvm.errors import UserError
from kivi_tvm.workloads import Inputs, Workload

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def grouped_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Matmul, softmax, matmul with the `M` query heads of a KV head as rows, scale on `q`.

    `[B, H_kv, M, D] @ [B, H_kv, D, T]`, softmax, `@ [B, H_kv, T, D]`.
    """
    B, _, D = q.shape
    rows = q.view(B, k.shape[1], -1, D) * D**-0.5
    return torch.softmax(rows @ k.mT, -1) @ v


def sdpa_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`scaled_dot_product_attention` with the `M` query heads of a KV head as query rows."""
    B, _, D = q.shape
    return F.scaled_dot_product_attention(q.view(B, k.shape[1], -1, D), k, v)


def sdpa_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`scaled_dot_product_attention(enable_gqa=True)`, what transformers calls."""
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)


ALGORITHMS: dict[str, Attention] = {
    "torch-matmul": grouped_matmul,
    "torch-sdpa-rows": sdpa_rows,
    "torch-sdpa-gqa": sdpa_gqa,
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
PEERS = [f"{algorithm}-{dtype}" for algorithm in ALGORITHMS for dtype in DTYPES]
# bfloat16 is the speed floor's, float32 the exact one; `--peers` adds float16.
DEFAULT_PEERS = [name for name in PEERS if not name.endswith("fp16")]
# The peer of the speed floor.
BASELINE = "torch-matmul-bf16"


def cache_bytes(w: Workload, dtype: torch.dtype) -> int:
    """Keys and values of `T + 1` tokens, read once."""
    return 2 * w.batch_size * w.num_kv_heads * (w.tokens + 1) * w.head_dim * dtype.itemsize


def parse(name: str) -> tuple[Attention, torch.dtype]:
    """The algorithm and the cache dtype of peer `name`.

    Raises
    ------
    UserError
        `name` is not in `PEERS`.
    """
    if name not in PEERS:
        raise UserError(f"`peers` must be among {PEERS}, got {name!r}")
    algorithm, _, slug = name.rpartition("-")
    return ALGORITHMS[algorithm], DTYPES[slug]


def torch_peer(name: str, w: Workload, inputs: Inputs, copies: int) -> Provider:
    """Peer `name` on the tokens of `inputs`, the first decode step included.

    Raises
    ------
    UserError
        `name` is not in `PEERS`, or the rows are ragged.
    """
    algorithm, dtype = parse(name)
    if w.lengths is not None:
        raise UserError(f"`lengths` must be None for torch peers, got {w.lengths}")
    q = inputs.q[0].to(dtype)
    # [B, H_kv, T, D] and [B, H_kv, D] -> [B, H_kv, T + 1, D]
    k = torch.cat([inputs.k, inputs.k_new[0][:, :, None]], 2).to(dtype)
    v = torch.cat([inputs.v, inputs.v_new[0][:, :, None]], 2).to(dtype)
    calls = [partial(algorithm, q, k.clone(), v.clone()) for _ in range(copies)]
    expected, tolerance = exact_attention(q, k, v), PEER_TOLERANCES[dtype]
    return Provider(name, "peer", calls, cache_bytes(w, dtype), expected, tolerance)
