"""Keys of a prompt into pages: per channel, groups of `G_k` consecutive tokens."""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import DTYPE_BYTES, PACKED_KEYS, key_order
from kivi_tvm.ops.prefetch import prefetch_tokens
from kivi_tvm.ops.quantize import code_of, edge_of, edges, probe, scale_of, zero_of

FETCH = "fetch"  # the block that asks for the memory of the next group


def key_group_blocks(key: KernelKey):
    """The blocks that turn `x [G, D]` float32 into `scale, zero [D]` and `word [D / W, G]`."""
    D, G, W, bits = key.head_dim, key.key_group_size, key.key_codes_per_word, key.key_bits
    order, E = key_order(key), len(edges(bits))

    @T.macro
    def key_group(x, scale, zero, word):
        low = T.sblock_alloc_buffer((D,), "float32")
        high = T.sblock_alloc_buffer((D,), "float32")
        probed = T.sblock_alloc_buffer((D,), "float32")
        edge = T.sblock_alloc_buffer((E, D), "float32")
        base = T.sblock_alloc_buffer((D,), "float32")
        code = T.sblock_alloc_buffer((G, D), "uint32")
        place = T.sblock_alloc_buffer((D // W, G, W), "uint32")
        for t, d in T.grid(G, D):
            with T.sblock("key_range"):
                vt, vd = T.axis.remap("RS", [t, d])
                with T.init():
                    low[vd] = T.max_value("float32")
                    high[vd] = T.min_value("float32")
                    probed[vd] = T.float32(0)
                low[vd] = T.min(low[vd], x[vt, vd])
                high[vd] = T.max(high[vd], x[vt, vd])
                probed[vd] = probed[vd] + probe(x[vt, vd])
        for d in range(D):
            with T.sblock("key_scale"):
                vd = T.axis.spatial(D, d)
                scale[vd] = scale_of(low[vd], high[vd], probed[vd], bits)
        for d in range(D):
            with T.sblock("key_zero"):
                vd = T.axis.spatial(D, d)
                zero[vd] = zero_of(low[vd], probed[vd])
        for e, d in T.grid(E, D):
            with T.sblock("key_edge"):
                ve, vd = T.axis.remap("SS", [e, d])
                edge[ve, vd] = edge_of(scale[vd], ve, bits)
        for d in range(D):
            with T.sblock("key_base"):
                vd = T.axis.spatial(D, d)
                base[vd] = T.Cast("float32", zero[vd])
        for t, d in T.grid(G, D):
            with T.sblock("key_code"):
                vt, vd = T.axis.remap("SS", [t, d])
                code[vt, vd] = code_of(x[vt, vd], base[vd], lambda e: edge[e, vd], bits)
        # The codes of a word have bits of their own: their sum is what holds them all.
        for w, t, i in T.grid(D // W, G, W):
            with T.sblock("key_place"):
                vw, vt, vs = T.axis.remap("SSS", [w, t, i])
                place[vw, vt, vs] = code[vt, order.element(vw, vs)] << T.Cast(
                    "uint32", order.shift(vs)
                )
        for w, t, i in T.grid(D // W, G, W):
            with T.sblock("key_word"):
                vs, vw, vt = T.axis.remap("RSS", [i, w, t])
                with T.init():
                    word[vw, vt] = T.uint32(0)
                word[vw, vt] = word[vw, vt] + place[vw, vt, vs]

    return key_group


def quantize_key(key: KernelKey, prefetch: str = "none"):
    """Quantize the first `packed_keys` tokens of every row into its pages.

    Parameters
    ----------
    key : KernelKey
    prefetch : str
        "next" asks for the memory of the next group in a block `fetch`, which a schedule spreads
        over the work on this one; "none" does not.

    Returns
    -------
    PrimFunc
        `(k_code, k_scale, k_zero, page_table [S, pages], state [S, 4], slots [B],
        k [B, H_kv, tokens, D])`; rows with slot -1 are skipped.
    """
    D, P, G, W = key.head_dim, key.page_size, key.key_group_size, key.key_codes_per_word
    key_group = key_group_blocks(key)
    fetch = prefetch_tokens(FETCH, G, D, DTYPE_BYTES[key.dtype])

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
                if prefetch == "next":
                    after = T.meta_var(T.min((vg + 1) * G, tokens - G))
                    fetch(k, vb, vh, lambda t: after + t)
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
