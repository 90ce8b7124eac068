"""Merge the partial results of a row's entries and window by log-sum-exp."""

from __future__ import annotations

import math

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import PACKED_VALUES, split_tokens
from kivi_tvm.ops.exp2 import exp2


def combine(key: KernelKey):
    """The output and log-sum-exp of every row from its partial results.

        m = max_x m_x,  l = sum_x l_x 2^(m_x - m),  out = sum_x acc_x 2^(m_x - m) / l
        lse = (m + log2 l) ln 2

    Returns
    -------
    PrimFunc
        `(state [S, 4], slots [B], split, tail, part_acc [B, H, X, D], part_stat [B, H, X, 2],
        out [B, H, D], lse [B, H] float32)`. The row's first entries, one per part of `split` packed
        tokens (`layout.split_tokens`), and the `tail` last ones are read. Rows with slot -1 and
        rows that attended to nothing give out 0 and lse -inf.
    """
    D = key.head_dim

    @T.prim_func(s_tir=True)
    def combine(
        state_handle: T.handle,
        slots_handle: T.handle,
        split: T.int32,
        tail: T.int32,
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
                packed = T.meta_var(state[T.max(slots[vb], 0), PACKED_VALUES])
                entries = T.meta_var(
                    T.Select(
                        slots[vb] >= 0,
                        T.ceildiv(packed, split_tokens(key, packed, split, T.Select)) + tail,
                        0,
                    )
                )
                top = T.sblock_alloc_buffer((1,), "float32", scope="local")
                total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                acc = T.sblock_alloc_buffer((D,), "float32")
                top[0] = T.min_value("float32")
                total[0] = T.float32(0)
                for x in T.serial(entries):
                    entry = T.meta_var(T.Select(x >= entries - tail, X - entries + x, x))
                    top[0] = T.max(top[0], part_stat[vb, vh, entry, 0])
                for d in range(D):
                    with T.sblock("start"):
                        vd = T.axis.spatial(D, d)
                        acc[vd] = T.float32(0)
                for x in T.serial(entries):
                    with T.sblock("entry"):
                        vx = T.axis.opaque(X, x)
                        entry = T.meta_var(T.Select(vx >= entries - tail, X - entries + vx, vx))
                        below = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        gain = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        below[0] = part_stat[vb, vh, entry, 0] - top[0]
                        gain[0] = exp2(below[0])
                        total[0] = total[0] + gain[0] * part_stat[vb, vh, entry, 1]
                        for d in range(D):
                            with T.sblock("add"):
                                vd = T.axis.spatial(D, d)
                                # Declared as written only: an update in place is not scheduled.
                                T.reads(gain[0], part_acc[vb, vh, entry, vd])
                                T.writes(acc[vd])
                                acc[vd] = acc[vd] + gain[0] * part_acc[vb, vh, entry, vd]
                for d in range(D):
                    with T.sblock("out"):
                        vd = T.axis.spatial(D, d)
                        out[vb, vh, vd] = T.Cast(
                            key.dtype,
                            T.Select(total[0] == T.float32(0), T.float32(0), acc[vd] / total[0]),
                        )
                lse[vb, vh] = (top[0] + T.log2(total[0])) * T.float32(math.log(2))

    return combine
