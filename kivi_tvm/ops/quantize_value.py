"""Values of a prompt into pages: per token, groups of `G_v` consecutive channels."""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import DTYPE_BYTES, PACKED_VALUES, value_order
from kivi_tvm.ops.prefetch import prefetch_tokens
from kivi_tvm.ops.quantize import code_of, edge_of, edges, probe, scale_of, zero_of

FETCH = "fetch"  # the block that asks for the memory of the next word's tokens
ALL_BITS = 0xFFFFFFFF
PARTS = 16  # partial results of a group: a divisor of every group size


def value_token_blocks(key: KernelKey, tokens: int):
    """The blocks that quantize `x [tokens, D]` float32, token by token.

    They fill `scale, zero [D / G_v, tokens]` float16 and `code [tokens, D]` uint32.
    """
    D, G, bits = key.head_dim, key.value_group_size, key.value_bits
    E = len(edges(bits))

    @T.macro
    def value_tokens(x, scale, zero, code):
        # per lane first: what is reduced last lies side by side
        low_part = T.sblock_alloc_buffer((D // G, tokens, PARTS), "float32")
        high_part = T.sblock_alloc_buffer((D // G, tokens, PARTS), "float32")
        probed_part = T.sblock_alloc_buffer((D // G, tokens, PARTS), "float32")
        low = T.sblock_alloc_buffer((D // G, tokens), "float32")
        high = T.sblock_alloc_buffer((D // G, tokens), "float32")
        probed = T.sblock_alloc_buffer((D // G, tokens), "float32")
        edge = T.sblock_alloc_buffer((E, D // G, tokens), "float32")
        base = T.sblock_alloc_buffer((D // G, tokens), "float32")
        for g, t, i, c in T.grid(D // G, tokens, PARTS, G // PARTS):
            with T.sblock("value_range"):
                vg, vt, vi, vc = T.axis.remap("SSSR", [g, t, i, c])
                with T.init():
                    low_part[vg, vt, vi] = T.max_value("float32")
                    high_part[vg, vt, vi] = T.min_value("float32")
                    probed_part[vg, vt, vi] = T.float32(0)
                at = T.meta_var(vg * G + vc * PARTS + vi)
                low_part[vg, vt, vi] = T.min(low_part[vg, vt, vi], x[vt, at])
                high_part[vg, vt, vi] = T.max(high_part[vg, vt, vi], x[vt, at])
                probed_part[vg, vt, vi] = probed_part[vg, vt, vi] + probe(x[vt, at])
        for g, t, i in T.grid(D // G, tokens, PARTS):
            with T.sblock("value_low"):
                vi, vg, vt = T.axis.remap("RSS", [i, g, t])
                with T.init():
                    low[vg, vt] = T.max_value("float32")
                low[vg, vt] = T.min(low[vg, vt], low_part[vg, vt, vi])
        for g, t, i in T.grid(D // G, tokens, PARTS):
            with T.sblock("value_high"):
                vi, vg, vt = T.axis.remap("RSS", [i, g, t])
                with T.init():
                    high[vg, vt] = T.min_value("float32")
                high[vg, vt] = T.max(high[vg, vt], high_part[vg, vt, vi])
        for g, t, i in T.grid(D // G, tokens, PARTS):
            with T.sblock("value_probe"):
                vi, vg, vt = T.axis.remap("RSS", [i, g, t])
                with T.init():
                    probed[vg, vt] = T.float32(0)
                probed[vg, vt] += probed_part[vg, vt, vi]
        for g, t in T.grid(D // G, tokens):
            with T.sblock("value_scale"):
                vg, vt = T.axis.remap("SS", [g, t])
                scale[vg, vt] = scale_of(low[vg, vt], high[vg, vt], probed[vg, vt], bits)
        for g, t in T.grid(D // G, tokens):
            with T.sblock("value_zero"):
                vg, vt = T.axis.remap("SS", [g, t])
                zero[vg, vt] = zero_of(low[vg, vt], probed[vg, vt])
        for e, g, t in T.grid(E, D // G, tokens):
            with T.sblock("value_edge"):
                ve, vg, vt = T.axis.remap("SSS", [e, g, t])
                edge[ve, vg, vt] = edge_of(scale[vg, vt], ve, bits)
        for g, t in T.grid(D // G, tokens):
            with T.sblock("value_base"):
                vg, vt = T.axis.remap("SS", [g, t])
                base[vg, vt] = T.Cast("float32", zero[vg, vt])
        for t, d in T.grid(tokens, D):
            with T.sblock("value_code"):
                vt, vd = T.axis.remap("SS", [t, d])
                code[vt, vd] = code_of(
                    x[vt, vd], base[vd // G, vt], lambda e: edge[e, vd // G, vt], bits
                )

    return value_tokens


def quantize_value(key: KernelKey, prefetch: str = "none"):
    """Quantize the first `packed_values` tokens of every row into its pages.

    Parameters
    ----------
    key : KernelKey
    prefetch : str
        "next" asks for the memory of the next word's tokens in a block `fetch`, which a schedule
        spreads over the work on this one; "none" does not.

    Returns
    -------
    PrimFunc
        `(v_code, v_scale, v_zero, page_table [S, pages], state [S, 4], slots [B],
        v [B, H_kv, tokens, D])`; rows with slot -1 are skipped. Codes of a word whose tokens are
        not packed yet are 0.
    """
    D, P, G, W = key.head_dim, key.page_size, key.value_group_size, key.value_codes_per_word
    order = value_order(key)
    value_tokens = value_token_blocks(key, W)
    fetch = prefetch_tokens(FETCH, W, D, DTYPE_BYTES[key.dtype])

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
        for b, h, w in T.grid(B, H_kv, T.ceildiv(n_tokens, P) * (P // W)):
            with T.sblock("group"):
                vb, vh, vw = T.axis.remap("SSS", [b, h, w])
                T.where(
                    slots[b] >= 0 and order.element(w, 0) < state[T.max(slots[b], 0), PACKED_VALUES]
                )
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
                page = T.meta_var(page_table[slots[vb], vw // (P // W)])
                x = T.sblock_alloc_buffer((W, D), "float32")
                scale = T.sblock_alloc_buffer((D // G, W), "float16")
                zero = T.sblock_alloc_buffer((D // G, W), "float16")
                code = T.sblock_alloc_buffer((W, D), "uint32")
                word = T.sblock_alloc_buffer((D,), "uint32")
                if prefetch == "next":
                    fetch(v, vb, vh, lambda i: T.min(order.element(vw + 1, i), n_tokens - 1))
                for i, d in T.grid(W, D):
                    with T.sblock("load"):
                        vs, vd = T.axis.remap("SS", [i, d])
                        x[vs, vd] = T.Cast(
                            "float32", v[vb, vh, T.min(order.element(vw, vs), n_tokens - 1), vd]
                        )
                value_tokens(x, scale, zero, code)
                for d, i in T.grid(D, W):
                    with T.sblock("word"):
                        vd, vs = T.axis.remap("SR", [d, i])
                        with T.init():
                            word[vd] = T.uint32(0)
                        # masked, not selected: a code that is not needed must not be branched over
                        mask = T.meta_var(
                            T.Select(
                                order.element(vw, vs) < packed, T.uint32(ALL_BITS), T.uint32(0)
                            )
                        )
                        word[vd] = word[vd] + (
                            (code[vs, vd] & mask) << T.Cast("uint32", order.shift(vs))
                        )
                for d in range(D):
                    with T.sblock("store_code"):
                        vd = T.axis.spatial(D, d)
                        v_code[page, vh, vw % (P // W), vd] = word[vd]
                for g, i in T.grid(D // G, W):
                    with T.sblock("store_scale"):
                        vg, vs = T.axis.remap("SS", [g, i])
                        T.where(order.element(vw, i) < packed)
                        v_scale[page, vh, vg, order.element(vw, vs) % P] = scale[vg, vs]
                        v_zero[page, vh, vg, order.element(vw, vs) % P] = zero[vg, vs]

    return quantize_value
