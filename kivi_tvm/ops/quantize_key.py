"""Keys of a prompt into pages: per channel, groups of `G_k` consecutive tokens."""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import PACKED_KEYS, pack_order
from kivi_tvm.ops.quantize import code_of, non_finite, scale_of, zero_of


def key_group_blocks(key: KernelKey):
    """The blocks that turn `x [G, D]` float32 into `scale, zero [D]` and `word [D / W, G]`."""
    D, G, W, bits = key.head_dim, key.key_group_size, key.key_codes_per_word, key.key_bits
    order = pack_order(key.pack_order, bits)

    @T.macro
    def key_group(x, scale, zero, word):
        low = T.sblock_alloc_buffer((D,), "float32")
        high = T.sblock_alloc_buffer((D,), "float32")
        bad = T.sblock_alloc_buffer((D,), "int32")
        code = T.sblock_alloc_buffer((G, D), "uint32")
        for t, d in T.grid(G, D):
            with T.sblock("key_low"):
                vt, vd = T.axis.remap("RS", [t, d])
                with T.init():
                    low[vd] = T.max_value("float32")
                low[vd] = T.min(low[vd], x[vt, vd])
        for t, d in T.grid(G, D):
            with T.sblock("key_high"):
                vt, vd = T.axis.remap("RS", [t, d])
                with T.init():
                    high[vd] = T.min_value("float32")
                high[vd] = T.max(high[vd], x[vt, vd])
        for t, d in T.grid(G, D):
            with T.sblock("key_bad"):
                vt, vd = T.axis.remap("RS", [t, d])
                with T.init():
                    bad[vd] = 0
                bad[vd] += non_finite(x[vt, vd])
        for d in range(D):
            with T.sblock("key_scale"):
                vd = T.axis.spatial(D, d)
                scale[vd] = scale_of(low[vd], high[vd], bad[vd], bits)
        for d in range(D):
            with T.sblock("key_zero"):
                vd = T.axis.spatial(D, d)
                zero[vd] = zero_of(low[vd], bad[vd])
        for t, d in T.grid(G, D):
            with T.sblock("key_code"):
                vt, vd = T.axis.remap("SS", [t, d])
                code[vt, vd] = code_of(x[vt, vd], scale[vd], zero[vd], bits)
        for w, t, i in T.grid(D // W, G, W):
            with T.sblock("key_word"):
                vw, vt, vs = T.axis.remap("SSR", [w, t, i])
                with T.init():
                    word[vw, vt] = T.uint32(0)
                word[vw, vt] = word[vw, vt] | (
                    code[vt, order.element(vw, vs)] << T.Cast("uint32", order.shift(vs))
                )

    return key_group


def quantize_key(key: KernelKey):
    """Quantize the first `packed_keys` tokens of every row into its pages.

    Returns
    -------
    PrimFunc
        `(k_code, k_scale, k_zero, page_table [S, pages], state [S, 4], slots [B],
        k [B, H_kv, tokens, D])`; rows with slot -1 are skipped.
    """
    D, P, G, W = key.head_dim, key.page_size, key.key_group_size, key.key_codes_per_word
    key_group = key_group_blocks(key)

    @T.prim_func(s_tir=True)
    def quantize_key(
        k_code_handle: T.handle,
        k_scale_handle: T.handle,
        k_zero_handle: T.handle,
        page_table_handle: T.handle,
        state_handle: T.handle,
        slots_handle: T.handle,
        k_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        B, H_kv, N, S, pages, tokens = (
            T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(),
        )  # fmt: skip
        k_row, k_head, k_token = T.int32(), T.int32(), T.int32()
        k_code = T.match_buffer(k_code_handle, (N, H_kv, D // W, P), "uint32")
        k_scale = T.match_buffer(k_scale_handle, (N, H_kv, P // G, D), "float16")
        k_zero = T.match_buffer(k_zero_handle, (N, H_kv, P // G, D), "float16")
        page_table = T.match_buffer(page_table_handle, (S, pages), "int32")
        state = T.match_buffer(state_handle, (S, 4), "int32")
        slots = T.match_buffer(slots_handle, (B,), "int32")
        k = T.match_buffer(
            k_handle, (B, H_kv, tokens, D), key.dtype, strides=(k_row, k_head, k_token, 1)
        )
        for b, h, g in T.grid(B, H_kv, tokens // G):
            with T.sblock("group"):
                vb, vh, vg = T.axis.remap("SSS", [b, h, g])
                T.where(slots[b] >= 0 and g * G < state[T.max(slots[b], 0), PACKED_KEYS])
                T.reads(k[vb, vh, vg * G : vg * G + G, 0:D], slots[vb], page_table[0:S, 0:pages])
                T.writes(
                    k_code[0:N, vh, 0 : D // W, 0:P],
                    k_scale[0:N, vh, 0 : P // G, 0:D],
                    k_zero[0:N, vh, 0 : P // G, 0:D],
                )
                page = T.meta_var(page_table[slots[vb], vg * G // P])
                first = T.meta_var(vg * G % P)
                x = T.sblock_alloc_buffer((G, D), "float32")
                scale = T.sblock_alloc_buffer((D,), "float16")
                zero = T.sblock_alloc_buffer((D,), "float16")
                word = T.sblock_alloc_buffer((D // W, G), "uint32")
                for t, d in T.grid(G, D):
                    with T.sblock("load"):
                        vt, vd = T.axis.remap("SS", [t, d])
                        x[vt, vd] = T.Cast("float32", k[vb, vh, vg * G + vt, vd])
                key_group(x, scale, zero, word)
                for w, t in T.grid(D // W, G):
                    with T.sblock("store_code"):
                        vw, vt = T.axis.remap("SS", [w, t])
                        k_code[page, vh, vw, first + vt] = word[vw, vt]
                for d in range(D):
                    with T.sblock("store_scale"):
                        vd = T.axis.spatial(D, d)
                        k_scale[page, vh, first // G, vd] = scale[vd]
                        k_zero[page, vh, first // G, vd] = zero[vd]

    return quantize_key
