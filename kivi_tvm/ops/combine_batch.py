"""`combine_window` of mode "half" for batches that fill a GPU: the same sums, hence the same bits.

For one row as many warps as there are sums are the fastest; of many rows a GPU holds the more at
once the fewer warps each takes.
"""

from __future__ import annotations

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.combine_window_half import combine_window_half


def combine_batch(key: KernelKey, row_tile: int | None = None):
    """The output and log-sum-exp of every row from its window and its splits' partial results.

    Parameters and results as of `combine_window`, of a key with `compute="half"`.
    """
    return combine_window_half(key, row_tile)
