"""Partial results as the lanes of a warp hold them, folded into its state (`softmax_half.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from tvm.script import tirx as T

from kivi_tvm.ops.fragments import LANES, QUERIES, FullTile
from kivi_tvm.ops.softmax_half import add

PARTS = 2  # that are loaded at once


@dataclass(frozen=True, slots=True)
class Parts:
    """At most `count` partial results of the queries of a tile, and the regions they are in.

    `ref(query, entry)` and `mass(query, entry)` are what the sum and the accumulator `acc(query,
    entry, channel)` are for, and the sum.
    """

    count: Any
    regions: tuple[Any, ...]
    ref: Callable[[Any, Any], Any]
    mass: Callable[[Any, Any], Any]
    acc: Callable[[Any, Any, Any], Any]


def stored_parts(part_acc: Any, part_stat: Any, row: Any, first: Any, M: int) -> Parts:
    """Those of the `M` queries of a row from `first` on, as `attend` stores them."""
    _, _, X, D = part_acc.shape
    return Parts(
        X,
        (part_acc[row, first : first + M, 0:X, 0:D], part_stat[row, first : first + M, 0:X, 0:2]),
        lambda query, entry: part_stat[row, first + query, entry, 0],
        lambda query, entry: part_stat[row, first + query, entry, 1],
        lambda query, entry, channel: part_acc[row, first + query, entry, channel],
    )


def part_blocks(tile: FullTile, M: int, sums: int):
    """Fold every so many-th partial result into a sum, as if it were a token.

    Its weight is its sum, its value its accumulator:

        m = max_x m_x,  l = sum_x l_x 2^(m_x - m),  acc = sum_x acc_x 2^(m_x - m)
    """
    N, BLOCKS, APART = PARTS, tile.value_blocks, tile.channels_apart

    def folded(combine, first, of_part):
        """What there is combined with something of every part that is loaded at once."""
        return reduce(combine, map(of_part, range(N)), first)

    def place(turn, number, own, lane, e):
        """The partial result that goes into sum `own`, and the query of a lane."""
        return (turn * N + number) * sums + own, lane % 4 * 2 + e

    @T.macro
    def fold(parts, entries, own, ref, total, acc):
        for c in T.serial(T.max(0, T.ceildiv(T.ceildiv(entries[0] - own, sums), N))):
            with T.sblock("parts"):
                vc = T.axis.opaque(T.ceildiv(parts.count, sums * N), c)
                T.reads(*parts.regions, entries[0])
                # Declared as written only: an update in place is not scheduled.
                T.writes(
                    ref[0:LANES, 0:2],
                    total[0:LANES, 0:2],
                    acc[0:LANES, 0 : tile.value_rows * 4],
                )
                level = T.sblock_alloc_buffer((LANES, N, 2), "float32")
                mass = T.sblock_alloc_buffer((LANES, N, 2), "float32")
                near = T.sblock_alloc_buffer((LANES, N, 2, BLOCKS, APART), "float32")
                part_ref = T.sblock_alloc_buffer((LANES, 2), "float32")
                part_keep = T.sblock_alloc_buffer((LANES, 2), "float32")
                part_gain = T.sblock_alloc_buffer((LANES, N, 2), "float32")
                for n, e, y, lane, o in T.grid(N, 2, BLOCKS, LANES, APART):
                    with T.sblock("near"):
                        vn, ve, vy, vl, vo = T.axis.remap("SSSSS", [n, e, y, lane, o])
                        entry, query = T.meta_var(place(vc, vn, own, vl, ve))
                        near[vl, vn, ve, vy, vo] = T.if_then_else(
                            T.And(entry < entries[0], query < M),
                            parts.acc(query, entry, (vy * QUERIES + vl // 4) * APART + vo),
                            T.float32(0),
                        )
                for n, e, lane in T.grid(N, 2, LANES):
                    with T.sblock("level"):
                        vn, ve, vl = T.axis.remap("SSS", [n, e, lane])
                        entry, query = T.meta_var(place(vc, vn, own, vl, ve))
                        level[vl, vn, ve] = T.if_then_else(
                            T.And(entry < entries[0], query < M),
                            parts.ref(query, entry),
                            T.min_value("float32"),
                        )
                # The lanes `g` of a query sum up in the end: the first has it for all.
                for n, e, lane in T.grid(N, 2, LANES):
                    with T.sblock("part_mass"):
                        vn, ve, vl = T.axis.remap("SSS", [n, e, lane])
                        entry, query = T.meta_var(place(vc, vn, own, vl, ve))
                        mass[vl, vn, ve] = T.if_then_else(
                            T.And(T.And(entry < entries[0], query < M), vl // 4 == 0),
                            parts.mass(query, entry),
                            T.float32(0),
                        )
                for lane, e in T.grid(LANES, 2):
                    with T.sblock("part_ref"):
                        vl, ve = T.axis.remap("SS", [lane, e])
                        part_ref[vl, ve] = folded(T.max, ref[vl, ve], lambda n: level[vl, n, ve])
                for lane, e in T.grid(LANES, 2):
                    with T.sblock("part_keep"):
                        vl, ve = T.axis.remap("SS", [lane, e])
                        part_keep[vl, ve] = T.exp2(ref[vl, ve] - part_ref[vl, ve])
                for n, lane, e in T.grid(N, LANES, 2):
                    with T.sblock("part_gain"):
                        vn, vl, ve = T.axis.remap("SSS", [n, lane, e])
                        part_gain[vl, vn, ve] = T.exp2(level[vl, vn, ve] - part_ref[vl, ve])
                for lane, e in T.grid(LANES, 2):
                    with T.sblock("part_total"):
                        vl, ve = T.axis.remap("SS", [lane, e])
                        T.reads(part_keep[vl, ve], mass[vl, 0:N, ve], part_gain[vl, 0:N, ve])
                        T.writes(total[vl, ve])
                        total[vl, ve] = folded(
                            add,
                            total[vl, ve] * part_keep[vl, ve],
                            lambda n: mass[vl, n, ve] * part_gain[vl, n, ve],
                        )
                for t, lane, e in T.grid(tile.value_rows, LANES, 4):
                    with T.sblock("part_acc"):
                        vt, vl, ve = T.axis.remap("SSS", [t, lane, e])
                        y, o = T.meta_var((tile.block(vt), tile.place(vt, ve // 2)))
                        T.reads(
                            part_keep[vl, ve % 2],
                            near[vl, 0:N, ve % 2, y, o],
                            part_gain[vl, 0:N, ve % 2],
                        )
                        T.writes(acc[vl, vt * 4 + ve])
                        acc[vl, vt * 4 + ve] = folded(
                            add,
                            acc[vl, vt * 4 + ve] * part_keep[vl, ve % 2],
                            lambda n: near[vl, n, ve % 2, y, o] * part_gain[vl, n, ve % 2],
                        )
                for lane, e in T.grid(LANES, 2):
                    with T.sblock("keep_part_ref"):
                        vl, ve = T.axis.remap("SS", [lane, e])
                        ref[vl, ve] = part_ref[vl, ve]

    return fold
