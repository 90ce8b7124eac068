"""KIVI in plain torch: slow, obvious, and the only oracle of every test.

Shapes: `B` batch, `H` query heads, `H_kv` key/value heads, `T` tokens, `D` channels, `G` group
size, `R` residual length, `W = 32 / bits` codes per word (design section 2).

Source: paper (arXiv 2402.02750) Algorithm 1 and section 4.2; formulas of the authors'
`quant/new_pack.py`, with the guards for constant and non-finite groups that it lacks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kivi_tvm import layout
from kivi_tvm.config import KiviConfig

FLOAT16_MAX = 65504.0


class Quantized(NamedTuple):
    """Codes of one tensor with the scale and zero of each group.

    `code` uint8 has the tensor's shape; `scale` and `zero` float16 have one entry per group
    along the grouped dimension.
    """

    code: Tensor
    scale: Tensor
    zero: Tensor


def quantize(x: Tensor, bits: int, group_size: int, dim: int) -> Quantized:
    """Quantize `x` in groups of `group_size` consecutive elements along `dim`.

    Parameters
    ----------
    x : Tensor
        Any shape and floating dtype; the arithmetic is float32.
    bits : int
        Bits per code, `b`.
    group_size : int
        Must divide `x.shape[dim]`.

    Returns
    -------
    Quantized
        `zero = fp16(min)`, `scale = fp16((max - min) / (2^b - 1))`, both saturated to the float16
        range; `code = clamp(rint((x - zero) / scale), 0, 2^b - 1)`, half to even. A group of
        stored scale 0 has codes 0. A group with a non-finite element has scale = zero = NaN and
        codes 0.

    Raises
    ------
    ValueError
        `group_size` does not divide the dimension.

    Examples
    --------
    Keys are grouped per channel (4 tokens each here), values per token (3 channels each):

    >>> k = torch.tensor([[0.3, 0.5, 0.7], [0.6, 0.8, 1.0], [0.9, 1.1, 1.3], [1.2, 1.4, 1.6]])
    >>> quantize(k, bits=2, group_size=4, dim=0).code.tolist()
    [[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3]]
    >>> v = torch.tensor([[0.2, 0.4, 0.6], [0.1, 0.3, 0.5]])
    >>> quantize(v, bits=2, group_size=3, dim=1).code.tolist()
    [[0, 2, 3], [0, 2, 3]]
    """
    if x.shape[dim] % group_size:
        raise ValueError(
            f"`group_size` must divide the size {x.shape[dim]} of dim {dim}, got {group_size}"
        )
    dim %= x.ndim
    x = x.float().unflatten(dim, (-1, group_size))
    axis = dim + 1
    finite = x.isfinite().all(axis, keepdim=True)
    low = x.amin(axis, keepdim=True)
    high = x.amax(axis, keepdim=True)
    levels = 2**bits - 1
    # Adding 0 turns -0 into 0: which of them is the minimum would depend on their order.
    zero = (low + 0.0).clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
    scale = ((high - low) / levels + 0.0).clamp(max=FLOAT16_MAX).half()
    nan = torch.full_like(zero, math.nan)
    zero, scale = torch.where(finite, zero, nan), torch.where(finite, scale, nan)
    step = scale.float()
    code = ((x - zero.float()) / step).round().clamp(0, levels)
    code = torch.where(finite & (step > 0), code, torch.zeros_like(code)).to(torch.uint8)
    return Quantized(code.flatten(dim, axis), scale.squeeze(axis), zero.squeeze(axis))


def dequantize(q: Quantized, dim: int) -> Tensor:
    """`code * scale + zero` in float32, the inverse of `quantize` along `dim`."""
    group_size = q.code.shape[dim] // q.scale.shape[dim]
    scale = q.scale.float().repeat_interleave(group_size, dim)
    zero = q.zero.float().repeat_interleave(group_size, dim)
    return q.code.float() * scale + zero


def pack(code: Tensor, bits: int, dim: int, order: str = "plain") -> Tensor:
    """Pack codes along `dim` into 32-bit words held as int32.

    Parameters
    ----------
    code : Tensor
        uint8 codes; the size of `dim` must be a multiple of `32 / bits`.

    Returns
    -------
    Tensor
        int32, `dim` smaller by `32 / bits`.

    Raises
    ------
    ValueError
        The size of `dim` is not a multiple of the codes per word.
    """
    rule = layout.pack_order(order, bits)
    W = rule.codes_per_word
    if code.shape[dim] % W:
        raise ValueError(f"size of dim {dim} must be a multiple of {W}, got {code.shape[dim]}")
    element = torch.arange(code.shape[dim])
    shift = rule.shift(rule.slot(element))
    wide = code.long().movedim(dim, -1) << shift
    words = torch.zeros(*wide.shape[:-1], code.shape[dim] // W, dtype=torch.int64)
    words.index_add_(-1, rule.word(element), wide)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return signed.to(torch.int32).movedim(-1, dim)


def unpack(words: Tensor, bits: int, dim: int, order: str = "plain") -> Tensor:
    """The inverse of `pack`: int32 words to uint8 codes."""
    rule = layout.pack_order(order, bits)
    element = torch.arange(words.shape[dim] * rule.codes_per_word)
    wide = words.movedim(dim, -1).long()[..., rule.word(element)]
    code: Tensor = (wide >> rule.shift(rule.slot(element))) & rule.code_mask
    return code.to(torch.uint8).movedim(-1, dim)


def quantize_key(k: Tensor, bits: int, group_size: int) -> Quantized:
    """Keys `[..., T, D]`: per channel, groups of consecutive tokens."""
    return quantize(k, bits, group_size, dim=k.ndim - 2)


def quantize_value(v: Tensor, bits: int, group_size: int) -> Quantized:
    """Values `[..., T, D]`: per token, groups of consecutive channels."""
    return quantize(v, bits, group_size, dim=v.ndim - 1)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of one query per head in the dtype given, grouped heads allowed.

    Parameters
    ----------
    q : Tensor
        `[H, D]`.
    k, v : Tensor
        `[H_kv, T, D]`, `T >= 1`.
    scale : float, optional
        Multiplies the scores; default `D ** -0.5`.

    Returns
    -------
    out : Tensor
        `[H, D]`.
    lse : Tensor
        `[H]`, natural log of the sum of exponentials of the scaled scores.
    """
    H, D = q.shape
    scale = D**-0.5 if scale is None else scale
    grouped = q.reshape(k.shape[0], -1, D)
    score = grouped @ k.mT * scale  # [H_kv, M, D] @ [H_kv, D, T] -> [H_kv, M, T]
    out = score.softmax(-1) @ v  # [H_kv, M, T] @ [H_kv, T, D] -> [H_kv, M, D]
    return out.reshape(H, D), score.logsumexp(-1).reshape(H)


class ReferenceRow:
    """One sequence's cache by Algorithm 1: what attention may see, token by token.

    `k`, `v` `[H_kv, L, D]` in the model dtype hold what attention sees: dequantized values where
    a token is packed, the exact ones in the window.
    """

    def __init__(self, cfg: KiviConfig, window: str = "kivi") -> None:
        self.cfg, self.window = cfg, window
        self.dtype = getattr(torch, cfg.dtype)
        empty = torch.zeros(cfg.H_kv, 0, cfg.D)
        self.k_seen = empty  # float32, so that codes of a float16 model stay unrounded
        self.v_seen = empty
        self.k_exact = empty.to(self.dtype)
        self.v_exact = empty.to(self.dtype)
        self.packed_keys = 0
        self.packed_values = 0

    @property
    def length(self) -> int:
        return self.k_exact.shape[1]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens `k, v [H_kv, n, D]`, then quantize what Algorithm 1 says is due."""
        cfg = self.cfg
        self.k_exact = torch.cat([self.k_exact, k], 1)
        self.v_exact = torch.cat([self.v_exact, v], 1)
        self.k_seen = torch.cat([self.k_seen, k.float()], 1)
        self.v_seen = torch.cat([self.v_seen, v.float()], 1)
        due = slice(self.packed_keys, self.length - self.length % cfg.R)
        if due.stop > due.start:
            codes = quantize_key(self.k_exact[:, due], cfg.key_bits, cfg.G_k)
            self.k_seen[:, due] = dequantize(codes, 1)
            self.packed_keys = due.stop
        due = slice(self.packed_values, max(0, self.length - cfg.R))
        if due.stop > due.start:
            codes = quantize_value(self.v_exact[:, due], cfg.value_bits, cfg.G_v)
            self.v_seen[:, due] = dequantize(codes, 2)
            self.packed_values = due.stop

    def visible(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[H_kv, L, D]` in float32 as the kernels see them.

        In the window (the tokens whose value is full precision) a packed key is the dequantized
        one rounded to the model dtype (`window="kivi"`) or the exact one (`window="exact"`).
        """
        k = self.k_seen.clone()
        ring = slice(self.packed_values, self.length)
        source = self.k_exact if self.window == "exact" else self.k_seen.to(self.dtype)
        k[:, ring] = source[:, ring].float()
        return k, self.v_seen


class ReferenceCache:
    """A batch of `ReferenceRow`s with the calls of `kivi_tvm`'s cache, in plain torch.

    Parameters
    ----------
    cfg : KiviConfig
    batch_size : int
    window : str
        "kivi" (Algorithm 1) or "exact" (keys of the window stay exact after a flush).
    accumulate : torch.dtype
        Dtype of the attention arithmetic.
    """

    def __init__(
        self,
        cfg: KiviConfig,
        batch_size: int,
        window: str = "kivi",
        accumulate: torch.dtype = torch.float64,
    ) -> None:
        self.cfg, self.accumulate = cfg, accumulate
        self.rows = [ReferenceRow(cfg, window) for _ in range(batch_size)]

    def prefill(self, k: Tensor, v: Tensor, lengths: list[int] | None = None) -> None:
        """Store `k, v [B, H_kv, T, D]`, the first `lengths[i]` tokens of row `i`."""
        for i, row in enumerate(self.rows):
            n = k.shape[2] if lengths is None else lengths[i]
            row.append(k[i, :, :n], v[i, :, :n])

    def append(self, k: Tensor, v: Tensor) -> None:
        """Store one new token per row, `k, v [B, H_kv, D]`."""
        for i, row in enumerate(self.rows):
            row.append(k[i, :, None], v[i, :, None])

    def attend(self, q: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """`q [B, H, D]` against everything stored: out `[B, H, D]` and lse `[B, H]`."""
        results = []
        for i, row in enumerate(self.rows):
            k, v = (x.to(self.accumulate) for x in row.visible())
            results.append(attention(q[i].to(self.accumulate), k, v, scale))
        return torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results])

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """One step: append `k, v [B, H_kv, D]`, then attend with `q [B, H, D]`."""
        self.append(k, v)
        return self.attend(q, scale)[0]
