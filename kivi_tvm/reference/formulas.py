"""Quantization, packing and attention of one tensor.

Source: paper (arXiv 2402.02750) section 4.2; formulas of the authors' `quant/new_pack.py`, with
the guards for constant and non-finite groups that it lacks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kivi_tvm import layout
from kivi_tvm.config import WORD_BITS

FLOAT16_MAX = 65504.0
# The dimension of keys `[..., T, D]` along which consecutive elements form a group.
KEY_AXES = {"channel": -2, "token": -1}


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


def pack(code: Tensor, bits: int, dim: int, order: layout.PackOrder | None = None) -> Tensor:
    """Pack codes along `dim` into 32-bit words held as int32.

    Parameters
    ----------
    code : Tensor
        uint8 codes; the size of `dim` must be a multiple of `32 / bits`, and of the order's span.
    order : PackOrder, optional
        Default "plain".

    Returns
    -------
    Tensor
        int32, `dim` smaller by `32 / bits`.

    Raises
    ------
    ValueError
        The size of `dim` is not a whole number of words or spans.
    """
    W, count = WORD_BITS // bits, code.shape[dim]
    rule = order or layout.pack_order("plain", bits, W)
    if count % rule.span:
        raise ValueError(f"size of dim {dim} must be a multiple of {rule.span}, got {count}")
    element = torch.arange(count)
    wide = code.long().movedim(dim, -1) << rule.shift(rule.slot(element))
    words = torch.zeros(*wide.shape[:-1], count // W, dtype=torch.int64)
    words.index_add_(-1, rule.word(element), wide)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return signed.to(torch.int32).movedim(-1, dim)


def unpack(words: Tensor, bits: int, dim: int, order: layout.PackOrder | None = None) -> Tensor:
    """The inverse of `pack`: int32 words to uint8 codes."""
    count = words.shape[dim] * (WORD_BITS // bits)
    rule = order or layout.pack_order("plain", bits, WORD_BITS // bits)
    element = torch.arange(count)
    wide = words.movedim(dim, -1).long()[..., rule.word(element)]
    code: Tensor = (wide >> rule.shift(rule.slot(element))) & rule.code_mask
    return code.to(torch.uint8).movedim(-1, dim)


def repack(words: Tensor, dim: int, source: layout.PackOrder, target: layout.PackOrder) -> Tensor:
    """int32 words in order `source` as words in order `target`; equal bits and spans.

    As unpacking and packing again, with a 16th of the memory at 2 bits.
    """
    if source == target:
        return words
    found = torch.zeros_like(words)
    number = torch.arange(words.shape[dim])
    shape = [-1 if i == dim % words.dim() else 1 for i in range(words.dim())]
    for slot in range(target.codes_per_word):
        element = target.element(number, slot)
        held = words.index_select(dim, source.word(element))
        shift = source.shift(source.slot(element)).to(torch.int32).reshape(shape)
        found |= ((held >> shift) & target.code_mask) << target.shift(slot)
    return found


def quantize_key(k: Tensor, bits: int, group_size: int, axis: str = "channel") -> Quantized:
    """Keys `[..., T, D]`: per channel, groups of consecutive tokens; or per token, as values."""
    return quantize(k, bits, group_size, dim=KEY_AXES[axis])


def quantize_value(v: Tensor, bits: int, group_size: int) -> Quantized:
    """Values `[..., T, D]`: per token, groups of consecutive channels."""
    return quantize(v, bits, group_size, dim=-1)


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
