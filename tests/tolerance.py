"""How far attention may be from a float64 reference on the same codes: one table."""

from __future__ import annotations

import torch

RELATIVE_L2 = {
    # Sums of some hundred float32 products and a polynomial exp2: a few 1e-7 each.
    torch.float32: 1e-5,
    # The output is rounded to 11 bits, 2.4e-4 rms at most; inputs are exact.
    torch.float16: 2e-3,
    # Rounded to 8 bits, 2e-3 rms at most.
    torch.bfloat16: 1e-2,
}

# Data "flat": what cancels is 100 to 1000 times the result, and with it the error above.
FLAT_FLOAT32 = 1e-4


def relative_l2(found, expected):
    """|found - expected| / |expected| in float64."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


def limit(dtype, max_score=0.0):
    """The tolerance for a dtype; a float32 score loses digits as it grows."""
    scale = max(1.0, max_score / 100) if dtype == torch.float32 else 1.0
    return RELATIVE_L2[dtype] * scale


def assert_close(found, expected, dtype=None, max_score=0.0, what="", bound=None):
    """Fail unless `found` is within the table's tolerance of `expected`."""
    assert found.shape == expected.shape, what
    error = relative_l2(found, expected)
    bound = limit(dtype or found.dtype, max_score) if bound is None else bound
    assert error <= bound, f"{what}: relative L2 {error:.2e} above {bound:.0e}"
