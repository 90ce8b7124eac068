"""The operators of the cache as TensorIR, one file each: mathematics only, nothing about threads.

The names of an operator's blocks are the contract with the schedule of the same stem under
`kivi_tvm.schedules`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kivi_tvm.ops.advance import advance
from kivi_tvm.ops.append import append
from kivi_tvm.ops.attend import attend
from kivi_tvm.ops.attend_batch import attend_batch
from kivi_tvm.ops.attend_new import attend_new
from kivi_tvm.ops.attend_window import attend_window
from kivi_tvm.ops.combine import combine
from kivi_tvm.ops.combine_batch import combine_batch
from kivi_tvm.ops.combine_few import combine_few
from kivi_tvm.ops.combine_window import combine_window
from kivi_tvm.ops.dequantize_key import dequantize_key
from kivi_tvm.ops.dequantize_value import dequantize_value
from kivi_tvm.ops.fill_window import fill_window
from kivi_tvm.ops.quantize_key import quantize_key
from kivi_tvm.ops.quantize_value import quantize_value

Operator = Callable[..., Any]

# Every operator: a factory from the kernel key, and from what a schedule offers beside it, to a
# PrimFunc of that name.
OPS: dict[str, Operator] = {
    "advance": advance,
    "append": append,
    "attend": attend,
    "attend_batch": attend_batch,
    "attend_new": attend_new,
    "attend_window": attend_window,
    "combine": combine,
    "combine_batch": combine_batch,
    "combine_few": combine_few,
    "combine_window": combine_window,
    "dequantize_key": dequantize_key,
    "dequantize_value": dequantize_value,
    "fill_window": fill_window,
    "quantize_key": quantize_key,
    "quantize_value": quantize_value,
}

# Functions of modules for GPUs alone, and of those in mode "half", for large batches and for few
# rows of several query heads; as below.
GPU_FUNCTIONS: dict[str, tuple[str, bool]] = {"combine_window": ("combine_window", False)}
BATCH_FUNCTIONS: dict[str, tuple[str, bool]] = {
    "attend_batch": ("attend_batch", False),
    "combine_batch": ("combine_batch", False),
}
FEW_FUNCTIONS: dict[str, tuple[str, bool]] = {"combine_few": ("combine_few", False)}
# Every function of any compiled module: its operator, and whether it takes the queries of several
# new tokens (`KernelKey.extend_rows`) instead of one.
FUNCTIONS: dict[str, tuple[str, bool]] = {
    **{
        name: (name, False)
        for name in OPS
        if name not in ("attend_new", *GPU_FUNCTIONS, *BATCH_FUNCTIONS, *FEW_FUNCTIONS)
    },
    "extend_attend": ("attend", True),
    "extend_window": ("attend_window", True),
    "extend_new": ("attend_new", True),
}
ALL_FUNCTIONS = FUNCTIONS | GPU_FUNCTIONS | BATCH_FUNCTIONS | FEW_FUNCTIONS
