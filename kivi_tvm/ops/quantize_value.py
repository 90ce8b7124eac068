"""Values of a prompt into pages: per token, groups of `G_v` consecutive channels."""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import PACKED_VALUES, pack_order
from kivi_tvm.ops.quantize import code_of, non_finite, scale_of, zero_of


def value_token_blocks(key: KernelKey, tokens: int):
    """The blocks that quantize `x [tokens, D]` float32, token by token.

    They fill `scale, zero [D / G_v, tokens]` float16 and `code [tokens, D]` uint32.
    """
    D, G, bits = key.head_dim, key.value_group_size, key.value_bits

    @T.macro
    def value_tokens(x, scale, zero, code):
        low = T.sblock_alloc_buffer((D // G, tokens), "float32")
        high = T.sblock_alloc_buffer((D // G, tokens), "float32")
        bad = T.sblock_alloc_buffer((D // G, tokens), "int32")
        for g, t, c in T.grid(D // G, tokens, G):
            with T.sblock("value_low"):
                vg, vt, vc = T.axis.remap("SSR", [g, t, c])
                with T.init():
                    low[vg, vt] = T.max_value("float32")
                low[vg, vt] = T.min(low[vg, vt], x[vt, vg * G + vc])
        for g, t, c in T.grid(D // G, tokens, G):
            with T.sblock("value_high"):
                vg, vt, vc = T.axis.remap("SSR", [g, t, c])
                with T.init():
                    high[vg, vt] = T.min_value("float32")
                high[vg, vt] = T.max(high[vg, vt], x[vt, vg * G + vc])
        for g, t, c in T.grid(D // G, tokens, G):
            with T.sblock("value_bad"):
                vg, vt, vc = T.axis.remap("SSR", [g, t, c])
                with T.init():
                    bad[vg, vt] = 0
                bad[vg, vt] += non_finite(x[vt, vg * G + vc])
        for g, t in T.grid(D // G, tokens):
            with T.sblock("value_scale"):
                vg, vt = T.axis.remap("SS", [g, t])
                scale[vg, vt] = scale_of(low[vg, vt], high[vg, vt], bad[vg, vt], bits)
        for g, t in T.grid(D // G, tokens):
            with T.sblock("value_zero"):
                vg, vt = T.axis.remap("SS", [g, t])
                zero[vg, vt] = zero_of(low[vg, vt], bad[vg, vt])
        for t, d in T.grid(tokens, D):
            with T.sblock("value_code"):
                vt, vd = T.axis.remap("SS", [t, d])
                code[vt, vd] = code_of(x[vt, vd], scale[vd // G, vt], zero[vd // G, vt], bits)

    return value_tokens


def quantize_value(key: KernelKey):
    """Quantize the first `packed_values` tokens of every row into its pages.

    Returns
    -------
    PrimFunc
        `(v_code, v_scale, v_zero, page_table [S, pages], state [S, 4], slots [B],
        v [B, H_kv, tokens, D])`; rows with slot -1 are skipped. Codes of a word whose tokens are
        not packed yet are 0.
    """
    D, P, G, W = key.head_dim, key.page_size, key.value_group_size, key.value_codes_per_word
    order = pack_order(key.pack_order, key.value_bits)
    value_tokens = value_token_blocks(key, W)

    @T.prim_func(s_tir=True)
    def quantize_value(
        v_code_handle: T.handle,
        v_scale_handle: T.handle,
        v_zero_handle: T.handle,
        page_table_handle: T.handle,
        state_handle: T.handle,
        slots_handle: T.handle,
        v_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        B, H_kv, N, S, pages, n_tokens = (
            T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(),
        )  # fmt: skip
        v_row, v_head, v_token = T.int32(), T.int32(), T.int32()
        v_code = T.match_buffer(v_code_handle, (N, H_kv, P // W, D), "uint32")
        v_scale = T.match_buffer(v_scale_handle, (N, H_kv, D // G, P), "float16")
        v_zero = T.match_buffer(v_zero_handle, (N, H_kv, D // G, P), "float16")
        page_table = T.match_buffer(page_table_handle, (S, pages), "int32")
        state = T.match_buffer(state_handle, (S, 4), "int32")
        slots = T.match_buffer(slots_handle, (B,), "int32")
        v = T.match_buffer(
            v_handle, (B, H_kv, n_tokens, D), key.dtype, strides=(v_row, v_head, v_token, 1)
        )
        for b, h, w in T.grid(B, H_kv, T.ceildiv(n_tokens, W)):
            with T.sblock("group"):
                vb, vh, vw = T.axis.remap("SSS", [b, h, w])
                T.where(slots[b] >= 0 and w * W < state[T.max(slots[b], 0), PACKED_VALUES])
                T.reads(
                    v[vb, vh, 0:n_tokens, 0:D],
                    slots[vb],
                    state[0:S, 0:4],
                    page_table[0:S, 0:pages],
                )
                T.writes(
                    v_code[0:N, vh, 0 : P // W, 0:D],
                    v_scale[0:N, vh, 0 : D // G, 0:P],
                    v_zero[0:N, vh, 0 : D // G, 0:P],
                )
                packed = T.meta_var(state[slots[vb], PACKED_VALUES])
                page = T.meta_var(page_table[slots[vb], vw * W // P])
                first = T.meta_var(vw * W % P)
                x = T.sblock_alloc_buffer((W, D), "float32")
                scale = T.sblock_alloc_buffer((D // G, W), "float16")
                zero = T.sblock_alloc_buffer((D // G, W), "float16")
                code = T.sblock_alloc_buffer((W, D), "uint32")
                word = T.sblock_alloc_buffer((D,), "uint32")
                for t, d in T.grid(W, D):
                    with T.sblock("load"):
                        vt, vd = T.axis.remap("SS", [t, d])
                        x[vt, vd] = T.Cast(
                            "float32", v[vb, vh, T.min(vw * W + vt, n_tokens - 1), vd]
                        )
                value_tokens(x, scale, zero, code)
                for d, i in T.grid(D, W):
                    with T.sblock("word"):
                        vd, vs = T.axis.remap("SR", [d, i])
                        with T.init():
                            word[vd] = T.uint32(0)
                        word[vd] = word[vd] | (
                            T.Select(
                                vw * W + order.element(0, vs) < packed,
                                code[order.element(0, vs), vd],
                                T.uint32(0),
                            )
                            << T.Cast("uint32", order.shift(vs))
                        )
                for d in range(D):
                    with T.sblock("store_code"):
                        vd = T.axis.spatial(D, d)
                        v_code[page, vh, first // W, vd] = word[vd]
                for g, t in T.grid(D // G, W):
                    with T.sblock("store_scale"):
                        vg, vt = T.axis.remap("SS", [g, t])
                        T.where(vw * W + t < packed)
                        v_scale[page, vh, vg, first + vt] = scale[vg, vt]
                        v_zero[page, vh, vg, first + vt] = zero[vg, vt]

    return quantize_value
