"""How far attention may be from a float64 reference on the same codes: one table."""

from __future__ import annotations

from kivi_tvm.tune.cases.tolerance import RELATIVE_L2, limit
from kivi_tvm.tune.measure import relative_l2

__all__ = ["FLAT_FLOAT32", "RELATIVE_L2", "assert_close", "limit", "relative_l2"]

# Data "flat": what cancels is 100 to 1000 times the result, and with it the error above.
FLAT_FLOAT32 = 1e-4


def assert_close(found, expected, dtype=None, max_score=0.0, what="", bound=None):
    """Fail unless `found` is within the table's tolerance of `expected`."""
    assert found.shape == expected.shape, what
    error = relative_l2(found, expected)
    bound = limit(dtype or found.dtype, max_score) if bound is None else bound
    assert error <= bound, f"{what}: relative L2 {error:.2e} above {bound:.0e}"
