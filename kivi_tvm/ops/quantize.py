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
PROBE = 1e-30
NAN_BITS = 0x7E00  # the quiet NaN of float16


def probe(x):
    """What is summed over a group to tell whether it is finite: no sum of it overflows."""
    return x * T.float32(PROBE)


def _half(x, probed):
    """`x` saturated to float16, -0 as 0; NaN where the sum `probed` is not finite.

    The minimum of 0 and -0 is either of them, depending on the order in which they are met.
    """
    x = T.Select(x == T.float32(0), T.float32(0), x)
    limit = T.float32(FLOAT16_MAX)
    half = T.Cast("float16", T.max(T.min(x, limit), -limit))
    finite = T.max(probed, -probed) <= T.float32(FLOAT32_MAX)  # NaN compares false
    return T.Select(finite, half, T.reinterpret("float16", T.uint16(NAN_BITS)))


def zero_of(low, probed):
    """The stored zero of a group with minimum `low`."""
    return _half(low, probed)


def scale_of(low, high, probed, bits):
    """The stored scale of a group with minimum `low` and maximum `high`; true division."""
    return _half((high - low) / T.float32(2**bits - 1), probed)


def edges(bits: int) -> tuple[float, ...]:
    """What `code_of` compares with or divides by, in units of the stored scale."""
    return tuple(k + 0.5 for k in range(3)) if bits == 2 else (1.0,)


def edge_of(scale, number, bits):
    """The edge `number` of a stored scale; infinite where all codes are to be 0."""
    step = T.Cast("float32", scale)
    unit = T.float32(edges(bits)[0]) + T.Cast("float32", number)
    return T.Select(step > T.float32(0), step * unit, T.infinity("float32"))


def code_of(x, base, edge, bits):
    """The code of float32 `x` under the stored zero `base` and the edges `edge(number)`, as uint32.

    With 2 bits the division is replaced by comparisons, which give the same codes. A stored scale
    has 11 significant bits, so that `scale (k + 1/2)` is exact in float32; and a float32 `y` other
    than that is at least 2^-24 of it away, more than half a unit in the last place of `k + 1/2`
    (for y below a power of two: of the number below it). The quotient `y / scale` is therefore
    rounded to the side of `k + 1/2` that it is on, and to `k + 1/2` only if it is equal to it.
    """
    y = x - base
    if bits == 2:
        # halves go to even
        low = T.Select(y > edge(0), T.uint32(1), T.uint32(0))
        return T.Select(y > edge(2), T.uint32(3), T.Select(y >= edge(1), T.uint32(2), low))
    # The maximum first: of NaN and 0 it is 0, since it takes its first operand if that is greater.
    level = T.min(T.max(T.nearbyint(y / edge(0)), T.float32(0)), T.float32(2**bits - 1))
    return T.Cast("uint32", T.Cast("int32", level))


def dequantized(code, scale, zero):
    """`code * scale + zero` in float32; the product of a code and a float16 is exact."""
    return T.Cast("float32", code) * T.Cast("float32", scale) + T.Cast("float32", zero)


def code_at(word, order, slot):
    """The code in `slot` of a packed word, as uint32."""
    return (word >> T.Cast("uint32", order.shift(slot))) & T.uint32(order.code_mask)
