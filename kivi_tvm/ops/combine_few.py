"""`combine_window` of mode "half" for few rows: the same sums, hence the same bits.

Where a GPU has room for more work-groups, query heads of a KV head that share what is loaded of the
window wait for each other's partial results.
"""

from __future__ import annotations

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.combine_window_half import combine_window_half

ROWS = 2  # of a tile at most


def has_few(key: KernelKey) -> bool:
    """Whether modules of `key` for GPUs have this function: whether its tiles are smaller."""
    return key.compute == "half" and key.queries_per_kv > ROWS


def combine_few(key: KernelKey, row_tile: int = ROWS):
    """The output and log-sum-exp of every row from its window and its splits' partial results.

    Parameters and results as of `combine_window`, of a key with `compute="half"`.
    """
    return combine_window_half(key, row_tile)
