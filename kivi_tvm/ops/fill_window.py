"""The rings after a prompt: its last tokens, keys already packed as their dequantized values."""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import LENGTH, PACKED_KEYS, key_order
from kivi_tvm.ops.quantize import code_at, dequantized


def fill_window(key: KernelKey):
    """Fill every row's rings from a prompt that starts at token 0.

    Ring slot `p` gets the last token `t < L` with `t mod (R + E) = p`, if there is one. A key
    below `packed_keys` enters dequantized when `write_back` is not 0 (`window="kivi"`).

    Returns
    -------
    PrimFunc
        `(k_code, k_scale, k_zero, k_ring, v_ring [S, H_kv, R + E, D], page_table [S, pages],
        state [S, 4], slots [B], k, v [B, H_kv, tokens, D], write_back)`; rows with slot -1 are
        skipped.
    """
    D, P, G, W, dtype = (
        key.head_dim, key.page_size, key.key_group_size, key.key_codes_per_word, key.dtype,
    )  # fmt: skip
    order = key_order(key)

    @T.prim_func(s_tir=True)
    def fill_window(
        k_code_handle: T.handle,
        k_scale_handle: T.handle,
        k_zero_handle: T.handle,
        k_ring_handle: T.handle,
        v_ring_handle: T.handle,
        page_table_handle: T.handle,
        state_handle: T.handle,
        slots_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        write_back: T.int32,
    ):
        T.func_attr({"tirx.noalias": True})
        B, H_kv, N, S, pages, ring, tokens = (
            T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(),
        )  # fmt: skip
        k_row, k_head, k_token = T.int32(), T.int32(), T.int32()
        v_row, v_head, v_token = T.int32(), T.int32(), T.int32()
        k_code = T.match_buffer(k_code_handle, (N, H_kv, D // W, P), "uint32")
        k_scale = T.match_buffer(k_scale_handle, (N, H_kv, P // G, D), "float16")
        k_zero = T.match_buffer(k_zero_handle, (N, H_kv, P // G, D), "float16")
        k_ring = T.match_buffer(k_ring_handle, (S, H_kv, ring, D), dtype)
        v_ring = T.match_buffer(v_ring_handle, (S, H_kv, ring, D), dtype)
        page_table = T.match_buffer(page_table_handle, (S, pages), "int32")
        state = T.match_buffer(state_handle, (S, 4), "int32")
        slots = T.match_buffer(slots_handle, (B,), "int32")
        k = T.match_buffer(
            k_handle, (B, H_kv, tokens, D), dtype, strides=(k_row, k_head, k_token, 1)
        )
        v = T.match_buffer(
            v_handle, (B, H_kv, tokens, D), dtype, strides=(v_row, v_head, v_token, 1)
        )
        for b, h, p in T.grid(B, H_kv, ring):
            with T.sblock("token"):
                vb, vh, vp = T.axis.remap("SSS", [b, h, p])
                T.where(slots[b] >= 0 and p < state[T.max(slots[b], 0), LENGTH])
                T.reads(
                    k[vb, vh, 0:tokens, 0:D],
                    v[vb, vh, 0:tokens, 0:D],
                    k_code[0:N, vh, 0 : D // W, 0:P],
                    k_scale[0:N, vh, 0 : P // G, 0:D],
                    k_zero[0:N, vh, 0 : P // G, 0:D],
                    page_table[0:S, 0:pages],
                    state[0:S, 0:4],
                    slots[vb],
                )
                T.writes(k_ring[0:S, vh, vp, 0:D], v_ring[0:S, vh, vp, 0:D])
                slot = T.meta_var(slots[vb])
                last = T.meta_var(state[slot, LENGTH] - 1)
                token = T.meta_var(last - (last - vp) % ring)
                for d in range(D):
                    with T.sblock("value"):
                        vd = T.axis.spatial(D, d)
                        v_ring[slot, vh, vp, vd] = v[vb, vh, token, vd]
                for d in range(D):
                    with T.sblock("key"):
                        vd = T.axis.spatial(D, d)
                        page = T.meta_var(page_table[slot, token // P])
                        k_ring[slot, vh, vp, vd] = T.if_then_else(
                            write_back != 0 and token < state[slot, PACKED_KEYS],
                            T.Cast(
                                dtype,
                                dequantized(
                                    code_at(
                                        k_code[page, vh, order.word(vd), token % P],
                                        order,
                                        order.slot(vd),
                                    ),
                                    k_scale[page, vh, token % P // G, vd],
                                    k_zero[page, vh, token % P // G, vd],
                                ),
                            ),
                            k[vb, vh, token, vd],
                        )

    return fill_window
