"""Copies of tiles near the warp that takes them: one is copied while another is computed with.

Every warp of a work-group has two places for each of the arrays of a tile. A row of an array has
gaps behind it, so that lanes that read at once find their elements in different banks of shared
memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import DTYPE_BYTES
from kivi_tvm.ops.fragments import LANES, TOKENS
from kivi_tvm.ops.regions import ALL, regions

PLACES = 2
LINE_BYTES = 16  # that a lane copies at once


@dataclass(frozen=True, slots=True)
class StagedArray:
    """Where the rows of one array of a tile lie: `rows` of `columns` elements, `stride` apart."""

    name: str
    rows: int
    columns: int
    stride: int
    dtype: str

    @property
    def size(self) -> int:
        """Elements of a place."""
        return self.rows * self.stride

    @property
    def nbytes(self) -> int:
        return self.size * DTYPE_BYTES[self.dtype]


def staged_arrays(key: KernelKey) -> tuple[StagedArray, ...]:
    """The arrays of a tile: codes, scales and zeros of keys, then of values.

    Banks have 4 bytes. Lanes `(g, c)` that read at once, two `g` with four `c`, are a row per `c`
    apart of codes, and a row per `g` of zeros: gaps of 8, 4 and 16 banks put them side by side.
    """
    D, groups = key.head_dim, max(1, TOKENS // key.key_group_size)
    value_groups = D // key.value_group_size
    return (
        StagedArray("k_code", D // key.key_codes_per_word, TOKENS, TOKENS + 8, "uint32"),
        StagedArray("k_scale", groups, D, D + 8, "float16"),
        StagedArray("k_zero", groups, D, D + 8, "float16"),
        StagedArray("v_code", TOKENS // key.value_codes_per_word, D, D + 8, "uint32"),
        StagedArray("v_scale", value_groups, TOKENS, TOKENS + 32, "float16"),
        StagedArray("v_zero", value_groups, TOKENS, TOKENS + 32, "float16"),
    )


def staged_bytes(key: KernelKey) -> int:
    """Shared memory of a warp."""
    return PLACES * sum(array.nbytes for array in staged_arrays(key))


def copy_block(name: str, array: StagedArray):
    """Copy rows from `[page, head, row, column]` on to a place, `LINE_BYTES` per lane and turn."""
    line = LINE_BYTES // DTYPE_BYTES[array.dtype]
    of_row = array.columns // line
    lines = array.rows * of_row

    def source_at(at: Any) -> tuple[Any, Any]:
        return at // of_row, at % of_row * line

    def target_at(at: Any) -> Any:
        return at // of_row * array.stride + at % of_row * line

    @T.macro
    def copy(source, page, head, row, column, target, warp, place):
        for n, lane in T.grid(-(-lines // LANES), LANES):
            with T.sblock(name):
                vn, vl = T.axis.remap("SS", [n, lane])
                T.where(n * LANES + lane < lines)
                down, across = T.meta_var(source_at(vn * LANES + vl))
                to = T.meta_var(target_at(vn * LANES + vl))
                T.reads(source[page, head, row + down, column + across : column + across + line])
                T.writes(target[warp, place, to : to + line])
                for o in range(line):
                    with T.sblock(f"{name}_line"):
                        vo = T.axis.spatial(line, o)
                        T.reads(source[page, head, row + down, column + across + vo])
                        T.writes(target[warp, place, to + vo])
                        target[warp, place, to + vo] = source[
                            page, head, row + down, column + across + vo
                        ]

    return copy


def copy_tile_blocks(key: KernelKey, prefix: str):
    """Copy all arrays of the tile at token `at` of a page; blocks `prefix_k_code` and so on.

    The macro takes what is stored and the tiles as two tuples in the order of `staged_arrays`, and
    whether to copy, with what that and the page are read from.
    """
    k_code_rows, k_scale_rows, k_zero_rows, v_code_rows, v_scale_rows, v_zero_rows = (
        copy_block(f"{prefix}_{array.name}", array) for array in staged_arrays(key)
    )
    G_k, W_v = key.key_group_size, key.value_codes_per_word

    @T.macro
    def copy_tile(holds, known, stored, page, head, at, tiles, warp, place):
        with T.sblock(f"copy_{prefix}"):
            T.where(holds)
            T.reads(*regions(stored, ALL, head), *known)
            T.writes(*regions(tiles, warp))
            k_code_rows(stored[0], page, head, 0, at, tiles[0], warp, place)
            k_scale_rows(stored[1], page, head, at // G_k, 0, tiles[1], warp, place)
            k_zero_rows(stored[2], page, head, at // G_k, 0, tiles[2], warp, place)
            v_code_rows(stored[3], page, head, at // W_v, 0, tiles[3], warp, place)
            v_scale_rows(stored[4], page, head, 0, at, tiles[4], warp, place)
            v_zero_rows(stored[5], page, head, 0, at, tiles[5], warp, place)

    return copy_tile


def clear_tail_block(name: str, array: StagedArray):
    """Let the items of tokens from `left` on be 0, in an array with tokens as columns."""

    @T.macro
    def clear(target, warp, place, left):
        for row, n, lane in T.grid(array.rows, TOKENS // LANES, LANES):
            with T.sblock(name):
                vr, vn, vl = T.axis.remap("SSS", [row, n, lane])
                T.where(n * LANES + lane >= left)
                at = T.meta_var(vr * array.stride + vn * LANES + vl)
                T.reads()
                T.writes(target[warp, place, at])
                with T.sblock(f"{name}_item"):
                    T.reads()
                    T.writes(target[warp, place, at])
                    target[warp, place, at] = T.float16(0)

    return clear


def arrive_block(name: str):
    """Where what was stored is there for all lanes, and none reads the other place any more.

    As mathematics there is nothing to wait for: every lane gets a 1 that nobody reads.
    """

    @T.macro
    def arrive():
        here = T.sblock_alloc_buffer((LANES, 1), "uint32")
        for lane in range(LANES):
            with T.sblock(name):
                vl = T.axis.spatial(LANES, lane)
                here[vl, 0] = T.uint32(1)

    return arrive
