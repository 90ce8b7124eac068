"""Where a row's tokens are: those of the window in its ring, the packed ones in its splits."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import LENGTH, PACKED_VALUES, split_tokens


def slot_of(oldest: Any, count: Any, token: Any, ring: Any) -> Any:
    """The place in a ring of a token of the window; that of the last one where there is none.

    `oldest` is the place of the window's first token, `count` how many it has.
    """
    at = oldest + T.min(token, count - 1)
    return at - T.Select(at >= ring, ring, 0)


def window_blocks():
    """`slot`, `oldest` and `count` of a row's window, and what they are found from.

    A row that is not there has no tokens, in slot 0. What is used twice is computed once: a load is
    not merged with another beyond a condition.
    """

    @T.macro
    def find(state, slots, row, ring, given, slot, length, packed, oldest, count):
        with T.sblock("given"):
            given[0] = slots[row]
        with T.sblock("slot"):
            slot[0] = T.max(given[0], 0)
        with T.sblock("length"):
            length[0] = state[slot[0], LENGTH]
        with T.sblock("packed"):
            packed[0] = state[slot[0], PACKED_VALUES]
        with T.sblock("oldest"):
            oldest[0] = packed[0] % ring
        with T.sblock("count"):
            count[0] = T.Select(given[0] >= 0, length[0] - packed[0], 0)

    return find


def row_blocks(key: KernelKey):
    """`slot`, `oldest` and `count` of a row's window, and its partial results, `entries`.

    A row that is not there has no entries.
    """
    find_window = window_blocks()

    @T.macro
    def find(state, slots, row, ring, split, slot, oldest, count, entries):
        given = T.sblock_alloc_buffer((1,), "int32")
        length = T.sblock_alloc_buffer((1,), "int32")
        packed = T.sblock_alloc_buffer((1,), "int32")
        part = T.sblock_alloc_buffer((1,), "int32")  # packed tokens of a partial result
        find_window(state, slots, row, ring, given, slot, length, packed, oldest, count)
        with T.sblock("part"):
            part[0] = split_tokens(key, packed[0], split, T.Select)
        with T.sblock("entries"):
            entries[0] = T.Select(given[0] >= 0, T.ceildiv(packed[0], part[0]), 0)

    return find
