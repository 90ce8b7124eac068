"""`exp2` as vectorizable float32 arithmetic: `T.exp2` becomes one libm call per lane on CPUs."""

from __future__ import annotations

import math

from tvm.script import tirx as T

# Taylor series of 2^f = e^(f ln 2); on [-1/2, 1/2] its remainder is below 1.3e-7.
_DEGREE = 6
_COEFFICIENTS = [math.log(2) ** n / math.factorial(n) for n in range(_DEGREE + 1)]
_LOWEST = -126.0  # below it 2^x is not a normal float32; softmax weights that small are zero


def exp2(x):
    """`2^x` for float32 `x <= 127`; NaN stays NaN, arguments below -126 give 2^-126."""
    x = T.Select(x < T.float32(_LOWEST), T.float32(_LOWEST), x)
    whole = T.nearbyint(x)
    fraction = x - whole
    poly = T.float32(_COEFFICIENTS[-1])
    for coefficient in reversed(_COEFFICIENTS[:-1]):
        poly = poly * fraction + T.float32(coefficient)
    exponent = T.Cast("int32", T.Select(whole == whole, whole, T.float32(0)))
    return poly * T.reinterpret("float32", (exponent + 127) << 23)
