"""The step's new state of every sequence, once for all layers."""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import LENGTH, PACKED_KEYS, PACKED_VALUES


def advance(key: KernelKey):
    """Add `tokens[b]` tokens to row `b`: `L += tokens`, then the packed counts by Algorithm 1.

        packed_keys   = L - L mod R
        packed_values = max(packed_values, L - R)

    Returns
    -------
    PrimFunc
        `(state [S, 4], slots [B], tokens [B], R)`; rows with slot -1 are skipped.
    """
    del key  # the same for every key; taken so that all factories have one signature

    @T.prim_func(s_tir=True)
    def advance(
        state_handle: T.handle, slots_handle: T.handle, tokens_handle: T.handle, R: T.int32
    ):
        T.func_attr({"tirx.noalias": True})
        B, S = T.int32(), T.int32()
        state = T.match_buffer(state_handle, (S, 4), "int32")
        slots = T.match_buffer(slots_handle, (B,), "int32")
        tokens = T.match_buffer(tokens_handle, (B,), "int32")
        for b in range(B):
            with T.sblock("row"):
                vb = T.axis.spatial(B, b)
                T.where(slots[b] >= 0)
                # Declared as written only: a row's state is no other row's.
                T.reads(slots[vb], tokens[vb])
                T.writes(state[0:S, 0:4])
                slot = T.meta_var(slots[vb])
                state[slot, LENGTH] = state[slot, LENGTH] + tokens[vb]
                state[slot, PACKED_KEYS] = state[slot, LENGTH] // R * R
                state[slot, PACKED_VALUES] = T.max(
                    state[slot, PACKED_VALUES], state[slot, LENGTH] - R
                )

    return advance
