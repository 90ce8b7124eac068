"""Named geometries and the inputs that tests and benchmarks both run on. Imports torch, not tvm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kivi_tvm.config import KiviConfig

FLOAT16_MAX = 65504.0
DTYPE_SLUGS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True, slots=True)
class Workload:
    """One cache shape with the data to put into it.

    Parameters
    ----------
    num_heads, num_kv_heads, head_dim : int
        `H`, `H_kv` and `D`.
    tokens : int
        `T`, the tokens of a prefill and the length of every row unless `lengths` is given.
    batch_size : int
        `B`.
    key_bits, value_bits, group_size, residual_length, dtype, compute
        As in `KiviConfig`.
    data : str
        A name in `DATA`: how keys, values and queries are drawn.
    lengths : tuple of int, optional
        Ragged rows: `lengths[i] <= tokens` tokens of row `i` are valid, the others hold NaN.
    seed : int

    Raises
    ------
    ValueError
        One or more fields break a rule; the message lists them.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    tokens: int
    batch_size: int = 1
    key_bits: int = 2
    value_bits: int = 2
    group_size: int = 32
    residual_length: int = 128
    dtype: str = "float16"
    data: str = "normal"
    lengths: tuple[int, ...] | None = None
    seed: int = 0
    compute: str = "auto"

    def __post_init__(self) -> None:
        found = []
        if self.tokens < 0:
            found.append(f"`tokens` must not be negative, got {self.tokens}")
        if self.batch_size < 1:
            found.append(f"`batch_size` must be at least 1, got {self.batch_size}")
        if self.data not in DATA:
            found.append(f"`data` must be one of {list(DATA)}, got {self.data!r}")
        if self.lengths is not None:
            if len(self.lengths) != self.batch_size:
                found.append(
                    f"`lengths` must have batch_size={self.batch_size} entries, got {self.lengths}"
                )
            if any(not 0 <= n <= self.tokens for n in self.lengths):
                found.append(f"`lengths` must lie in [0, {self.tokens}], got {self.lengths}")
        if found:
            raise ValueError("; ".join(found))

    @property
    def cfg(self) -> KiviConfig:
        """The cache configuration of this workload."""
        return KiviConfig(
            head_dim=self.head_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            key_bits=self.key_bits,
            value_bits=self.value_bits,
            group_size=self.group_size,
            residual_length=self.residual_length,
            dtype=self.dtype,
            compute=self.compute,
        )

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Valid tokens of every row."""
        return (self.tokens,) * self.batch_size if self.lengths is None else self.lengths

    @property
    def id(self) -> str:
        """A name that can be read aloud, such as `B2-H8-Hkv2-T500-D128-b2-G32`."""
        same = self.key_bits == self.value_bits
        bits = f"b{self.key_bits}" if same else f"k{self.key_bits}v{self.value_bits}"
        ragged = self.lengths is not None
        tokens = "_".join(map(str, self.row_lengths)) if ragged else str(self.tokens)
        parts = [
            f"B{self.batch_size}-H{self.num_heads}-Hkv{self.num_kv_heads}",
            f"T{tokens}-D{self.head_dim}-{bits}-G{self.group_size}",
        ]
        if self.residual_length != 128:
            parts.append(f"R{self.residual_length}")
        if self.dtype != "float16":
            parts.append(DTYPE_SLUGS.get(self.dtype, self.dtype))
        if self.compute != "auto":
            parts.append(self.compute)
        if self.data != "normal":
            parts.append(self.data)
        if self.seed:
            parts.append(f"seed{self.seed}")
        return "-".join(parts)


class Drawn(NamedTuple):
    """Queries `[n, B, H, D]`, keys and values `[B, H_kv, T + n, D]`, all float32."""

    q: Tensor
    k: Tensor
    v: Tensor


class Inputs(NamedTuple):
    """A prefill followed by decode steps, in the workload's dtype.

    `k`, `v` `[B, H_kv, T, D]` with NaN past each row's length, `lengths` `[B]` (None: all `T`);
    `q` `[n, B, H, D]`, `k_new`, `v_new` `[n, B, H_kv, D]`, one entry per decode step.
    """

    k: Tensor
    v: Tensor
    lengths: list[int] | None
    q: Tensor
    k_new: Tensor
    v_new: Tensor


def _normal(x: Drawn, w: Workload) -> Drawn:
    return x


def _outlier(x: Drawn, w: Workload) -> Drawn:
    """A few key channels, other ones per head, are large at every token (paper figure 2)."""
    k = x.k.clone()
    for head in range(w.num_kv_heads):
        channels = [(7 * head + 29 * i) % w.head_dim for i in range(max(1, w.head_dim // 32))]
        k[:, head, :, channels] = 4 * k[:, head, :, channels] + 12
    return x._replace(k=k)


def _peaked(x: Drawn, w: Workload) -> Drawn:
    """Scores of standard deviation 8: a handful of tokens take nearly all of the softmax."""
    return x._replace(q=8 * x.q)


def _zero_mean(x: Drawn, w: Workload) -> Drawn:
    """Values whose mean over tokens is 0 and a nearly flat softmax: the output is almost 0."""
    return x._replace(q=x.q / 8, v=x.v - x.v.mean(2, keepdim=True))


def _constant(x: Drawn, w: Workload) -> Drawn:
    """Groups without a range: half of the key channels and the first value group."""
    k, v = x.k.clone(), x.v.clone()
    half = w.head_dim // 2
    k[..., :half] = k[:, :, :1, :half]
    v[..., : w.group_size] = v[..., :1]
    return x._replace(k=k, v=v)


def _huge(x: Drawn, w: Workload) -> Drawn:
    """Lone elements near or, where the dtype can hold them, beyond the float16 range."""
    top = 60000.0 if w.dtype == "float16" else 3 * FLOAT16_MAX
    k, v = x.k.clone(), x.v.clone()
    k[:, :, ::37, 5], k[:, :, 11::53, 9] = top, -top
    v[:, :, ::41, 3], v[:, :, 7::59, 17] = -top, top
    return x._replace(q=x.q / 1024, k=k, v=v)


def _tiny(x: Drawn, w: Workload) -> Drawn:
    """Ranges whose float16 scale is 0 or subnormal."""
    k, v = 1e-9 * x.k, 1e-9 * x.v
    k[..., 1::2] *= 1e3
    v[:, :, 1::2] *= 1e3
    return x._replace(k=k, v=v)


def _nonfinite(x: Drawn, w: Workload) -> Drawn:
    """One NaN among the keys and one infinity among the values of the first row and head."""
    k, v = x.k.clone(), x.v.clone()
    k[0, 0, :1, 1], v[0, 0, 1:2, 2] = math.nan, math.inf
    return x._replace(k=k, v=v)


DATA: dict[str, Callable[[Drawn, Workload], Drawn]] = {
    "normal": _normal,
    "outlier": _outlier,
    "peaked": _peaked,
    "zero_mean": _zero_mean,
    "constant": _constant,
    "huge": _huge,
    "tiny": _tiny,
    "nonfinite": _nonfinite,
}

# Geometries of real models; change what differs with `dataclasses.replace`.
MODELS: dict[str, Workload] = {
    "llama3-8b": Workload(num_heads=32, num_kv_heads=8, head_dim=128, tokens=4096),
    "llama2-7b": Workload(num_heads=32, num_kv_heads=32, head_dim=128, tokens=4096),
    "smollm2-135m": Workload(num_heads=9, num_kv_heads=3, head_dim=64, tokens=2048),
    "qwen2.5-7b": Workload(num_heads=28, num_kv_heads=4, head_dim=128, tokens=4096),
    "falcon-7b": Workload(num_heads=71, num_kv_heads=1, head_dim=64, tokens=2048),
}

# What tuning records are committed for: one layer of a real model's size, by what kernels see.
TUNED: dict[str, Workload] = {
    f"D{D}-M{M}-b{b}-{slug}": Workload(32, 32 // M, D, 8192, 1, b, b, dtype=dtype)
    for dtype, slug in DTYPE_SLUGS.items()
    for D in (64, 128)
    for M in (1, 4, 8)
    for b in (2, 4)
}


def make_inputs(w: Workload, steps: int = 1) -> Inputs:
    """Draw the prefill and `steps` decode steps of workload `w`.

    The same workload gives the same tensors. Keys and values of the steps continue those of the
    prefill, so that a one-shot cache of `T + steps` tokens can be compared with a streamed one.

    Parameters
    ----------
    w : Workload
    steps : int
        Decode steps, `n >= 0`.

    Returns
    -------
    Inputs
    """
    generator = torch.Generator().manual_seed(w.seed)
    shape = (w.batch_size, w.num_kv_heads, w.tokens + steps, w.head_dim)
    q_shape = (steps, w.batch_size, w.num_heads, w.head_dim)
    k, v = (torch.randn(shape, generator=generator) for _ in range(2))
    drawn = DATA[w.data](Drawn(torch.randn(q_shape, generator=generator), k, v), w)
    q, k, v = (x.to(getattr(torch, w.dtype)) for x in drawn)
    # [B, H_kv, n, D] -> [n, B, H_kv, D]
    k_new, v_new = (x[:, :, w.tokens :].movedim(2, 0).contiguous() for x in (k, v))
    k, v = (x[:, :, : w.tokens].clone() for x in (k, v))
    for row, length in enumerate(w.row_lengths):
        k[row, :, length:], v[row, :, length:] = math.nan, math.nan
    lengths = None if w.lengths is None else list(w.lengths)
    return Inputs(k, v, lengths, q, k_new, v_new)
