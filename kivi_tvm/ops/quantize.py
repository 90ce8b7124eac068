"""The quantization formula, once: as expressions and as the blocks that apply it to a group.

For a group `x` in float32 (design section 2):

    zero  = fp16(min x)                       saturated to +-65504
    scale = fp16((max x - min x) / (2^b - 1)) saturated to 65504
    code  = clamp(rint((x - zero) / scale), 0, 2^b - 1)

A stored scale of 0 gives codes 0. A group with a non-finite element has scale = zero = NaN and
codes 0, and no NaN is ever converted to an integer.
"""

from __future__ import annotations

from tvm.script import tirx as T

FLOAT16_MAX = 65504.0
FLOAT32_MAX = 3.4028234663852886e38
NAN_BITS = 0x7E00  # the quiet NaN of float16


def non_finite(x):
    """1 where float32 `x` is infinite or NaN, else 0 (NaN compares false)."""
    return T.Select(T.max(x, -x) <= T.float32(FLOAT32_MAX), T.int32(0), T.int32(1))


def _half(x, bad):
    """`x` saturated to float16, -0 as 0; NaN where `bad` is not 0.

    The minimum of 0 and -0 is either of them, depending on the order in which they are met.
    """
    x = T.Select(x == T.float32(0), T.float32(0), x)
    limit = T.float32(FLOAT16_MAX)
    half = T.Cast("float16", T.max(T.min(x, limit), -limit))
    return T.Select(bad == 0, half, T.reinterpret("float16", T.uint16(NAN_BITS)))


def zero_of(low, bad):
    """The stored zero of a group with minimum `low`."""
    return _half(low, bad)


def scale_of(low, high, bad, bits):
    """The stored scale of a group with minimum `low` and maximum `high`; true division."""
    return _half((high - low) / T.float32(2**bits - 1), bad)


def code_of(x, scale, zero, bits):
    """The code of float32 `x` under the stored float16 `scale` and `zero`, as uint32."""
    step = T.Cast("float32", scale)
    ratio = T.Select(step > T.float32(0), (x - T.Cast("float32", zero)) / step, T.float32(0))
    level = T.max(T.min(T.nearbyint(ratio), T.float32(2**bits - 1)), T.float32(0))
    return T.Cast("uint32", T.Cast("int32", level))


def dequantized(code, scale, zero):
    """`code * scale + zero` in float32; the product of a code and a float16 is exact."""
    return T.Cast("float32", code) * T.Cast("float32", scale) + T.Cast("float32", zero)


def code_at(word, order, slot):
    """The code in `slot` of a packed word, as uint32."""
    return (word >> T.Cast("uint32", order.shift(slot))) & T.uint32(order.code_mask)
