"""Softmax over a sequence taken chunk by chunk: the blocks that `attend` and its window share.

The running state of `M` rows is `run_max` (log2 units), `run_sum` and the unnormalized
`run_acc [M, D]`. A chunk contributes its own maximum, sum and accumulator, and

    m = max(run_max, chunk_max)
    run_sum = run_sum 2^(run_max - m) + chunk_sum 2^(chunk_max - m), run_acc alike.

A chunk's blocks never read the running state, and nothing is updated in place: that keeps both
parts schedulable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.exp2 import exp2

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class RowTiles:
    """The `total` query rows of a KV head as `count` tiles of `rows`, each with work of its own.

    A loop over (KV head, tile) has the extent `H_kv * count`. The last tile ends with the last row:
    where it overlaps the one before, both compute the same.
    """

    total: int
    rows: int

    @property
    def count(self) -> int:
        return -(-self.total // self.rows)

    def head(self, item: Any) -> Any:
        """The KV head of a loop's item."""
        return item // self.count

    def first(self, item: Any) -> Any:
        """The first row of an item's tile within its KV head."""
        if self.count == 1:
            return 0
        return T.min(item % self.count * self.rows, self.total - self.rows)

    def start(self, item: Any) -> Any:
        """The first row of an item's tile among all query rows."""
        return self.head(item) * self.total + self.first(item)


def row_tiles(key: KernelKey, rows: int | None) -> RowTiles:
    """Tiles of at most `rows` query rows; None: one tile of all."""
    return RowTiles(key.rows, min(rows or key.rows, key.rows))


def start_blocks(M: int, D: int):
    """The empty state: maximum at the lowest float32, sum and accumulator 0."""

    @T.macro
    def start(run_max, run_sum, run_acc):
        for m in range(M):
            with T.sblock("start_stat"):
                vm = T.axis.spatial(M, m)
                run_max[vm] = T.min_value("float32")
                run_sum[vm] = T.float32(0)
        for m, d in T.grid(M, D):
            with T.sblock("start_acc"):
                vm, vd = T.axis.remap("SS", [m, d])
                run_acc[vm, vd] = T.float32(0)

    return start


def softmax_blocks(M: int, C: int):
    """`prob = 2^(score - max)` over the chunk's `C` tokens, with its maximum and sum."""

    @T.macro
    def softmax(score, chunk_max, prob, chunk_sum):
        for m, t in T.grid(M, C):
            with T.sblock("max"):
                vm, vt = T.axis.remap("SR", [m, t])
                with T.init():
                    chunk_max[vm] = T.min_value("float32")
                chunk_max[vm] = T.max(chunk_max[vm], score[vm, vt])
        for m, t in T.grid(M, C):
            with T.sblock("prob"):
                vm, vt = T.axis.remap("SS", [m, t])
                prob[vm, vt] = exp2(score[vm, vt] - chunk_max[vm])
        for m, t in T.grid(M, C):
            with T.sblock("sum"):
                vm, vt = T.axis.remap("SR", [m, t])
                with T.init():
                    chunk_sum[vm] = T.float32(0)
                chunk_sum[vm] += prob[vm, vt]

    return softmax


def merge_blocks(M: int, D: int, of: str = ""):
    """Fold a chunk's maximum, sum and accumulator into the running state.

    The names of the blocks end in `of`, where a function has several such.
    """
    names = [name + of for name in ("new_stat", "new_sum", "new_acc", "keep_stat", "keep_acc")]

    @T.macro
    def merge(run_max, run_sum, run_acc, chunk_max, chunk_sum, chunk_acc):
        new_max = T.sblock_alloc_buffer((M,), "float32")
        new_sum = T.sblock_alloc_buffer((M,), "float32")
        new_acc = T.sblock_alloc_buffer((M, D), "float32")
        keep = T.sblock_alloc_buffer((M,), "float32")
        gain = T.sblock_alloc_buffer((M,), "float32")
        for m in range(M):
            with T.sblock(names[0]):
                vm = T.axis.spatial(M, m)
                new_max[vm] = T.max(run_max[vm], chunk_max[vm])
                keep[vm] = exp2(run_max[vm] - T.max(run_max[vm], chunk_max[vm]))
                gain[vm] = exp2(chunk_max[vm] - T.max(run_max[vm], chunk_max[vm]))
        for m in range(M):
            with T.sblock(names[1]):
                vm = T.axis.spatial(M, m)
                new_sum[vm] = run_sum[vm] * keep[vm] + chunk_sum[vm] * gain[vm]
        for m, d in T.grid(M, D):
            with T.sblock(names[2]):
                vm, vd = T.axis.remap("SS", [m, d])
                new_acc[vm, vd] = run_acc[vm, vd] * keep[vm] + chunk_acc[vm, vd] * gain[vm]
        for m in range(M):
            with T.sblock(names[3]):
                vm = T.axis.spatial(M, m)
                run_max[vm] = new_max[vm]
                run_sum[vm] = new_sum[vm]
        for m, d in T.grid(M, D):
            with T.sblock(names[4]):
                vm, vd = T.axis.remap("SS", [m, d])
                run_acc[vm, vd] = new_acc[vm, vd]

    return merge


def store_blocks(M: int, D: int):
    """Write the state as the partial result `entry` of heads `head .. head + M` of row `row`."""

    @T.macro
    def store(run_max, run_sum, run_acc, part_acc, part_stat, row, head, entry):
        for m in range(M):
            with T.sblock("store_stat"):
                vm = T.axis.spatial(M, m)
                part_stat[row, head + vm, entry, 0] = run_max[vm]
                part_stat[row, head + vm, entry, 1] = run_sum[vm]
        for m, d in T.grid(M, D):
            with T.sblock("store_acc"):
                vm, vd = T.axis.remap("SS", [m, d])
                part_acc[row, head + vm, entry, vd] = run_acc[vm, vd]

    return store
