"""Merge the partial results of a row's splits and window by log-sum-exp."""

from __future__ import annotations

import math

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import PACKED_VALUES
from kivi_tvm.ops.exp2 import exp2


def combine(key: KernelKey):
    """The output and log-sum-exp of every row from its partial results.

        m = max_x m_x,  l = sum_x l_x 2^(m_x - m),  out = sum_x acc_x 2^(m_x - m) / l
        lse = (m + log2 l) ln 2

    Returns
    -------
    PrimFunc
        `(state [S, 4], slots [B], part_acc [B, H, X + 1, D], part_stat [B, H, X + 1, 2],
        out [B, H, D], lse [B, H] float32)`. The row's `ceil(packed_values / split_tokens)` first
        entries and the last one are read. Rows with slot -1 give out 0 and lse -inf.
    """
    D, SPLIT = key.head_dim, key.split_tokens

    @T.prim_func(s_tir=True)
    def combine(
        state_handle: T.handle,
        slots_handle: T.handle,
        part_acc_handle: T.handle,
        part_stat_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        B, H, S, X, out_row, out_head = (
            T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(),
        )  # fmt: skip
        state = T.match_buffer(state_handle, (S, 4), "int32")
        slots = T.match_buffer(slots_handle, (B,), "int32")
        part_acc = T.match_buffer(part_acc_handle, (B, H, X, D), "float32")
        part_stat = T.match_buffer(part_stat_handle, (B, H, X, 2), "float32")
        out = T.match_buffer(out_handle, (B, H, D), key.dtype, strides=(out_row, out_head, 1))
        lse = T.match_buffer(lse_handle, (B, H), "float32")
        for b, h in T.grid(B, H):
            with T.sblock("head"):
                vb, vh = T.axis.remap("SS", [b, h])
                T.reads(
                    part_acc[vb, vh, 0:X, 0:D],
                    part_stat[vb, vh, 0:X, 0:2],
                    state[0:S, 0:4],
                    slots[vb],
                )
                T.writes(out[vb, vh, 0:D], lse[vb, vh])
                splits = T.meta_var(
                    T.Select(
                        slots[vb] >= 0,
                        T.ceildiv(state[T.max(slots[vb], 0), PACKED_VALUES], SPLIT) + 1,
                        0,
                    )
                )
                top = T.sblock_alloc_buffer((1,), "float32")
                total = T.sblock_alloc_buffer((1,), "float32")
                acc = T.sblock_alloc_buffer((D,), "float32")
                top[0] = T.min_value("float32")
                total[0] = T.float32(0)
                for x in T.serial(splits):
                    entry = T.meta_var(T.Select(x == splits - 1, X - 1, x))
                    top[0] = T.max(top[0], part_stat[vb, vh, entry, 0])
                for d in range(D):
                    with T.sblock("start"):
                        vd = T.axis.spatial(D, d)
                        acc[vd] = T.float32(0)
                for x in T.serial(splits):
                    with T.sblock("entry"):
                        vx = T.axis.opaque(X, x)
                        entry = T.meta_var(T.Select(vx == splits - 1, X - 1, vx))
                        below = T.sblock_alloc_buffer((1,), "float32")
                        gain = T.sblock_alloc_buffer((1,), "float32")
                        below[0] = part_stat[vb, vh, entry, 0] - top[0]
                        gain[0] = exp2(below[0])
                        total[0] = total[0] + gain[0] * part_stat[vb, vh, entry, 1]
                        for d in range(D):
                            with T.sblock("add"):
                                vd = T.axis.spatial(D, d)
                                acc[vd] = acc[vd] + gain[0] * part_acc[vb, vh, entry, vd]
                for d in range(D):
                    with T.sblock("out"):
                        vd = T.axis.spatial(D, d)
                        out[vb, vh, vd] = T.Select(
                            splits > 0, T.Cast(key.dtype, acc[vd] / total[0]), T.Cast(key.dtype, 0)
                        )
                lse[vb, vh] = T.if_then_else(
                    splits > 0,
                    (top[0] + T.log2(total[0])) * T.float32(math.log(2)),
                    T.float32(-math.inf),
                )

    return combine
