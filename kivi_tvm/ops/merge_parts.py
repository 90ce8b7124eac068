"""Partial results of the splits merged into what a kernel has of the window, and its output.

Each counts as if it were a token whose weight is its sum and whose value is its accumulator:

    m = max_x m_x,  l = sum_x l_x 2^(m_x - m),  out = sum_x acc_x 2^(m_x - m) / l
"""

from __future__ import annotations

import math

from tvm.script import tirx as T

from kivi_tvm.ops.online_softmax import merge_blocks
from kivi_tvm.ops.regions import regions

CHUNK_PARTS = 32  # partial results that are held at once
PART_SUMS = 8  # they are summed in so many sums of every so many-th, which are summed in the end


def part_blocks(M: int, D: int):
    """Fold the first `entries` partial results of `M` rows into their running state."""
    X_C, X_SUMS = CHUNK_PARTS, PART_SUMS
    merge_parts = merge_blocks(M, D, "_parts")

    @T.macro
    def fold(part_acc, part_stat, row, first, entries, run_max, run_sum, run_acc):
        run = T.meta_var((run_max, run_sum, run_acc))
        X = T.meta_var(part_acc.shape[2])
        part_max = T.sblock_alloc_buffer((M,), "float32")
        part_sum = T.sblock_alloc_buffer((M,), "float32")
        parts_acc = T.sblock_alloc_buffer((M, D), "float32")
        part = T.meta_var((part_max, part_sum, parts_acc))
        for c in T.serial(T.ceildiv(entries[0], X_C)):
            with T.sblock("parts"):
                vc = T.axis.opaque(T.ceildiv(X, X_C), c)
                T.reads(
                    part_acc[row, first : first + M, 0:X, 0:D],
                    part_stat[row, first : first + M, 0:X, 0:2],
                    entries[0],
                )
                T.writes(*regions(part))
                level = T.sblock_alloc_buffer((M, X_C), "float32")
                weight = T.sblock_alloc_buffer((M, X_C), "float32")
                part_near = T.sblock_alloc_buffer((X_SUMS, M, X_C // X_SUMS, D), "float32")
                parts = T.sblock_alloc_buffer((X_SUMS, M, D), "float32")
                for s, m, j, d in T.grid(X_SUMS, M, X_C // X_SUMS, D):
                    with T.sblock("part_near"):
                        vs, vm, vj, vd = T.axis.remap("SSSS", [s, m, j, d])
                        entry = T.meta_var(vc * X_C + vj * X_SUMS + vs)
                        part_near[vs, vm, vj, vd] = T.if_then_else(
                            entry < entries[0], part_acc[row, first + vm, entry, vd], T.float32(0)
                        )
                for m, x in T.grid(M, X_C):
                    with T.sblock("level"):
                        vm, vx = T.axis.remap("SS", [m, x])
                        level[vm, vx] = T.if_then_else(
                            vc * X_C + vx < entries[0],
                            part_stat[row, first + vm, vc * X_C + vx, 0],
                            T.min_value("float32"),
                        )
                for m, x in T.grid(M, X_C):
                    with T.sblock("part_max"):
                        vm, vx = T.axis.remap("SR", [m, x])
                        with T.init():
                            part_max[vm] = T.min_value("float32")
                        part_max[vm] = T.max(part_max[vm], level[vm, vx])
                for m, x in T.grid(M, X_C):
                    with T.sblock("weight"):
                        vm, vx = T.axis.remap("SS", [m, x])
                        weight[vm, vx] = T.Select(
                            vc * X_C + vx < entries[0],
                            T.exp2(level[vm, vx] - part_max[vm]),
                            T.float32(0),
                        )
                for m, x in T.grid(M, X_C):
                    with T.sblock("part_sum"):
                        vm, vx = T.axis.remap("SR", [m, x])
                        with T.init():
                            part_sum[vm] = T.float32(0)
                        part_sum[vm] += (
                            weight[vm, vx]
                            * part_stat[row, first + vm, T.min(vc * X_C + vx, entries[0] - 1), 1]
                        )
                for s, m, d, j in T.grid(X_SUMS, M, D, X_C // X_SUMS):
                    with T.sblock("parts_of"):
                        vs, vm, vd, vj = T.axis.remap("SSSR", [s, m, d, j])
                        with T.init():
                            parts[vs, vm, vd] = T.float32(0)
                        parts[vs, vm, vd] += (
                            weight[vm, vj * X_SUMS + vs] * part_near[vs, vm, vj, vd]
                        )
                for m, d, s in T.grid(M, D, X_SUMS):
                    with T.sblock("parts_acc"):
                        vm, vd, vs = T.axis.remap("SSR", [m, d, s])
                        with T.init():
                            parts_acc[vm, vd] = T.float32(0)
                        parts_acc[vm, vd] += parts[vs, vm, vd]
            with T.sblock("merge_parts"):
                T.reads(*regions((*run, *part)))
                T.writes(*regions(run))
                merge_parts(run_max, run_sum, run_acc, part_max, part_sum, parts_acc)

    return fold


def result_blocks(M: int, D: int, dtype: str):
    """The output and log-sum-exp of `M` rows from their state; 0 and -inf of an empty one."""

    @T.macro
    def finish(run_max, run_sum, run_acc, out, lse, row, first):
        for m, d in T.grid(M, D):
            with T.sblock("out"):
                vm, vd = T.axis.remap("SS", [m, d])
                out[row, first + vm, vd] = T.Cast(
                    dtype,
                    T.Select(
                        run_sum[vm] == T.float32(0),
                        T.float32(0),
                        run_acc[vm, vd] / run_sum[vm],
                    ),
                )
        for m in range(M):
            with T.sblock("lse"):
                vm = T.axis.spatial(M, m)
                lse[row, first + vm] = (run_max[vm] + T.log2(run_sum[vm])) * T.float32(math.log(2))

    return finish
