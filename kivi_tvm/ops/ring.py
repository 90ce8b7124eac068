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


def row_blocks(key: KernelKey):
    """`slot`, `oldest` and `count` of a row's window, and its partial results, `entries`.

    A row that is not there has no tokens and no entries, in slot 0.
    """

    @T.macro
    def find(state, slots, row, ring, split, slot, oldest, count, entries):
        with T.sblock("slot"):
            slot[0] = T.max(slots[row], 0)
        with T.sblock("oldest"):
            oldest[0] = state[slot[0], PACKED_VALUES] % ring
        with T.sblock("count"):
            count[0] = T.Select(
                slots[row] >= 0, state[slot[0], LENGTH] - state[slot[0], PACKED_VALUES], 0
            )
        with T.sblock("entries"):
            packed = T.meta_var(state[slot[0], PACKED_VALUES])
            entries[0] = T.Select(
                slots[row] >= 0,
                T.ceildiv(packed, split_tokens(key, packed, split, T.Select)),
                0,
            )

    return find
