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
from kivi_tvm.ops.fragments import LANES, TOKENS, HalfTile
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


def copy_block(name: str, key: KernelKey, array: StagedArray, of_row: int = 0, of_column: int = 0):
    """Copy the rows of one array of a tile to a place, `LINE_BYTES` per lane and turn.

    A row is of `of_row` tokens, or a column of `of_column`; the other is 0.
    """
    P, pieces = key.page_size, HalfTile(key).pieces
    line = LINE_BYTES // DTYPE_BYTES[array.dtype]
    of_lines = array.columns // line
    lines = array.rows * of_lines

    def source_at(at: Any, pages: Any, token: Any) -> tuple[Any, Any, Any]:
        """Page, row and column of a line of the tile that begins with a token of the row."""
        down, across = at // of_lines, at % of_lines * line
        page, inside = pages[0], token % P
        if pieces > 1:
            # without a branch: which piece it is differs between lanes
            size = TOKENS // pieces
            piece = (down * of_row + across * of_column) // size
            page += piece * (pages[1] - page)
            inside += piece * ((token + size) % P - size - inside)
        return page, inside // of_row + down if of_row else down, inside * of_column + across

    def target_at(at: Any) -> Any:
        return at // of_lines * array.stride + at % of_lines * line

    @T.macro
    def copy(source, pages, head, token, target, warp, place):
        for n, lane in T.grid(-(-lines // LANES), LANES):
            with T.sblock(name):
                vn, vl = T.axis.remap("SS", [n, lane])
                T.where(n * LANES + lane < lines)
                page, row, column = T.meta_var(source_at(vn * LANES + vl, pages, token))
                to = T.meta_var(target_at(vn * LANES + vl))
                T.reads(source[page, head, row, column : column + line])
                T.writes(target[warp, place, to : to + line])
                for o in range(line):
                    with T.sblock(f"{name}_line"):
                        vo = T.axis.spatial(line, o)
                        T.reads(source[page, head, row, column + vo])
                        T.writes(target[warp, place, to + vo])
                        target[warp, place, to + vo] = source[page, head, row, column + vo]

    return copy


def copy_tile_blocks(key: KernelKey, prefix: str):
    """Copy all arrays of the tile that begins with a token; blocks `prefix_k_code` and so on.

    The macro takes what is stored and the tiles as two tuples in the order of `staged_arrays`, and
    whether to copy, with what that is read from; `pages` are those of the tile's pieces.
    """
    G_k, W_v = key.key_group_size, key.value_codes_per_word
    k_code, k_scale, k_zero, v_code, v_scale, v_zero = staged_arrays(key)
    copy_k_code = copy_block(f"{prefix}_k_code", key, k_code, of_column=1)
    copy_k_scale = copy_block(f"{prefix}_k_scale", key, k_scale, of_row=G_k)
    copy_k_zero = copy_block(f"{prefix}_k_zero", key, k_zero, of_row=G_k)
    copy_v_code = copy_block(f"{prefix}_v_code", key, v_code, of_row=W_v)
    copy_v_scale = copy_block(f"{prefix}_v_scale", key, v_scale, of_column=1)
    copy_v_zero = copy_block(f"{prefix}_v_zero", key, v_zero, of_column=1)

    @T.macro
    def copy_tile(holds, known, stored, pages, head, token, tiles, warp, place):
        with T.sblock(f"copy_{prefix}"):
            T.where(holds)
            T.reads(*regions(stored, ALL, head), *known, *regions((pages,)))
            T.writes(*regions(tiles, warp))
            copy_k_code(stored[0], pages, head, token, tiles[0], warp, place)
            copy_k_scale(stored[1], pages, head, token, tiles[1], warp, place)
            copy_k_zero(stored[2], pages, head, token, tiles[2], warp, place)
            copy_v_code(stored[3], pages, head, token, tiles[3], warp, place)
            copy_v_scale(stored[4], pages, head, token, tiles[4], warp, place)
            copy_v_zero(stored[5], pages, head, token, tiles[5], warp, place)

    return copy_tile


def pages_block(name: str, key: KernelKey, early: bool = False):
    """The pages of the pieces of a tile, `pages [pieces]`, in a block `name`.

    Of a tile that is not there, and of a piece without tokens, page 0. `left` are the tokens of the
    split, or row, from the tile's first one on. With `early` they are loaded before it is known
    whether they are there, wherever the table has a place.
    """
    P, pieces = key.page_size, HalfTile(key).pieces
    size = TOKENS // pieces

    def page_of(page_table, slot, token, there):
        """The page of a token that is there."""
        row, at, places = slot[0], token // P, page_table.shape[1]
        if not early:
            return T.if_then_else(there, page_table[row, at], 0)
        return T.Select(there, T.if_then_else(at < places, page_table[row, at], 0), 0)

    @T.macro
    def look_up(holds, known, page_table, slot, token, left, pages):
        with T.sblock(name):
            T.reads(page_table[slot[0], 0 : page_table.shape[1]], *known)
            T.writes(*regions((pages,)))
            pages[0] = page_of(page_table, slot, token, holds)
            if pieces > 1:
                pages[1] = page_of(page_table, slot, token + size, T.And(holds, size < left))

    return look_up


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
