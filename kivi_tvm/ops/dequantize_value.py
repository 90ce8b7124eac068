"""Packed values from pages to a dense tensor, for inspection and export."""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import PACKED_VALUES, value_order
from kivi_tvm.ops.quantize import code_at, dequantized


def dequantize_value(key: KernelKey):
    """`code * scale + zero` of the first `packed_values` tokens, 0 beyond, in the model dtype.

    Returns
    -------
    PrimFunc
        `(v_code, v_scale, v_zero, page_table [S, pages], state [S, 4], slots [B],
        out [B, H_kv, tokens, D])`; rows with slot -1 are skipped.
    """
    D, P, G, W = key.head_dim, key.page_size, key.value_group_size, key.value_codes_per_word
    order = value_order(key)

    @T.prim_func(s_tir=True)
    def dequantize_value(
        v_code_handle: T.handle,
        v_scale_handle: T.handle,
        v_zero_handle: T.handle,
        page_table_handle: T.handle,
        state_handle: T.handle,
        slots_handle: T.handle,
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        B, H_kv, N, S, pages, tokens = (
            T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(),
        )  # fmt: skip
        v_code = T.match_buffer(v_code_handle, (N, H_kv, P // W, D), "uint32")
        v_scale = T.match_buffer(v_scale_handle, (N, H_kv, D // G, P), "float16")
        v_zero = T.match_buffer(v_zero_handle, (N, H_kv, D // G, P), "float16")
        page_table = T.match_buffer(page_table_handle, (S, pages), "int32")
        state = T.match_buffer(state_handle, (S, 4), "int32")
        slots = T.match_buffer(slots_handle, (B,), "int32")
        out = T.match_buffer(out_handle, (B, H_kv, tokens, D), key.dtype)
        for b, h, t, d in T.grid(B, H_kv, tokens, D):
            with T.sblock("dequantize"):
                vb, vh, vt, vd = T.axis.remap("SSSS", [b, h, t, d])
                T.where(slots[b] >= 0)
                page = T.meta_var(page_table[slots[vb], vt // P])
                out[vb, vh, vt, vd] = T.if_then_else(
                    vt < state[slots[vb], PACKED_VALUES],
                    T.Cast(
                        key.dtype,
                        dequantized(
                            code_at(
                                v_code[page, vh, order.word(vt % P), vd], order, order.slot(vt % P)
                            ),
                            v_scale[page, vh, vd // G, vt % P],
                            v_zero[page, vh, vd // G, vt % P],
                        ),
                    ),
                    T.Cast(key.dtype, 0),
                )

    return dequantize_value
