"""New tokens of each sequence: into the rings, and out of them what Algorithm 1 quantizes.

Token by token, with `L` the length that includes it and ring slot `t mod ring` of token `t`:

1. if `L > R`, the value of token `L - 1 - R` leaves the window and is quantized;
2. the new key and value are written to their ring slots;
3. the new key is also written to slot `(L - 1) mod X` of `k_exact`, where it stays exact;
4. if `L mod R = 0`, keys `[L - R, L)` are quantized as a block and, for `window="kivi"`, their
   dequantized values are written back into the ring.

With `ring > R` the value that leaves has a slot of its own, so that appending one token twice, with
no block due, equals appending it once. All that a token is written with, or over, is loaded first:
no load waits for the store of another.
"""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import LENGTH, key_order, value_order
from kivi_tvm.ops.quantize import code_at, dequantized
from kivi_tvm.ops.quantize_key import key_group_blocks
from kivi_tvm.ops.quantize_value import value_token_blocks
from kivi_tvm.ops.regions import ALL, regions


def append(key: KernelKey):
    """Append the first `added` tokens of every row, one after the other.

    Returns
    -------
    PrimFunc
        `(k_code, k_scale, k_zero, v_code, v_scale, v_zero, k_ring, v_ring [S, H_kv, ring, D],
        k_exact [S, H_kv, X, D], page_table [S, pages], state [S, 4] after the step, slots [B],
        added [B], k, v [B, H_kv, tokens, D], R, write_back)`; `X` may be 0, and no key is kept
        exact then; rows with slot -1 are skipped.
    """
    D, P, dtype = key.head_dim, key.page_size, key.dtype
    G_k, W_k = key.key_group_size, key.key_codes_per_word
    G_v, W_v = key.value_group_size, key.value_codes_per_word
    k_order = key_order(key)
    v_order = value_order(key)
    key_group = key_group_blocks(key)
    value_token = value_token_blocks(key, 1)

    @T.prim_func(s_tir=True)
    def append(
        k_code_handle: T.handle,
        k_scale_handle: T.handle,
        k_zero_handle: T.handle,
        v_code_handle: T.handle,
        v_scale_handle: T.handle,
        v_zero_handle: T.handle,
        k_ring_handle: T.handle,
        v_ring_handle: T.handle,
        k_exact_handle: T.handle,
        page_table_handle: T.handle,
        state_handle: T.handle,
        slots_handle: T.handle,
        added_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        R: T.int32,
        write_back: T.int32,
    ):
        T.func_attr({"tirx.noalias": True})
        B, H_kv, N, S, X, pages, ring, tokens = (
            T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(),
        )  # fmt: skip
        kept_slot, kept_head, kept_token = T.int32(), T.int32(), T.int32()
        k_row, k_head, k_token = T.int32(), T.int32(), T.int32()
        v_row, v_head, v_token = T.int32(), T.int32(), T.int32()
        k_code = T.match_buffer(k_code_handle, (N, H_kv, D // W_k, P), "uint32")
        k_scale = T.match_buffer(k_scale_handle, (N, H_kv, P // G_k, D), "float16")
        k_zero = T.match_buffer(k_zero_handle, (N, H_kv, P // G_k, D), "float16")
        v_code = T.match_buffer(v_code_handle, (N, H_kv, P // W_v, D), "uint32")
        v_scale = T.match_buffer(v_scale_handle, (N, H_kv, D // G_v, P), "float16")
        v_zero = T.match_buffer(v_zero_handle, (N, H_kv, D // G_v, P), "float16")
        k_ring = T.match_buffer(k_ring_handle, (S, H_kv, ring, D), dtype)
        v_ring = T.match_buffer(v_ring_handle, (S, H_kv, ring, D), dtype)
        # torch's strides of a tensor with X = 0 are not those that TVM calls compact
        k_exact = T.match_buffer(
            k_exact_handle, (S, H_kv, X, D), dtype, strides=(kept_slot, kept_head, kept_token, 1)
        )
        outputs = T.meta_var(
            (k_ring, v_ring, k_exact, k_code, k_scale, k_zero, v_code, v_scale, v_zero)
        )
        page_table = T.match_buffer(page_table_handle, (S, pages), "int32")
        state = T.match_buffer(state_handle, (S, 4), "int32")
        slots = T.match_buffer(slots_handle, (B,), "int32")
        added = T.match_buffer(added_handle, (B,), "int32")
        k = T.match_buffer(
            k_handle, (B, H_kv, tokens, D), dtype, strides=(k_row, k_head, k_token, 1)
        )
        v = T.match_buffer(
            v_handle, (B, H_kv, tokens, D), dtype, strides=(v_row, v_head, v_token, 1)
        )
        for b, h in T.grid(B, H_kv):
            with T.sblock("row"):
                vb, vh = T.axis.remap("SS", [b, h])
                T.where(slots[b] >= 0)
                # Rings and pages that are read back are declared as written only: a row touches no
                # other row's, and a block that reads its outputs could not be given to threads.
                T.reads(
                    k[vb, vh, 0:tokens, 0:D],
                    v[vb, vh, 0:tokens, 0:D],
                    added[vb],
                    page_table[0:S, 0:pages],
                    state[0:S, 0:4],
                    slots[vb],
                )
                T.writes(*regions(outputs, ALL, vh))
                for i in T.serial(added[vb]):
                    with T.sblock("token"):
                        vi = T.axis.opaque(tokens, i)
                        T.reads(
                            k[vb, vh, 0:tokens, 0:D],
                            v[vb, vh, 0:tokens, 0:D],
                            added[vb],
                            page_table[0:S, 0:pages],
                            state[0:S, 0:4],
                            slots[vb],
                        )
                        T.writes(*regions(outputs, ALL, vh))
                        own_slot = T.sblock_alloc_buffer((1,), "int32")
                        length = T.sblock_alloc_buffer((1,), "int32")
                        k_new = T.sblock_alloc_buffer((D,), dtype)
                        v_new = T.sblock_alloc_buffer((D,), dtype)
                        slot, L = T.meta_var((own_slot[0], length[0]))
                        with T.sblock("slot"):
                            own_slot[0] = slots[vb]
                        for d in range(D):
                            with T.sblock("load_new_value"):
                                vd = T.axis.spatial(D, d)
                                v_new[vd] = v[vb, vh, vi, vd]
                        for d in range(D):
                            with T.sblock("load_new_key"):
                                vd = T.axis.spatial(D, d)
                                k_new[vd] = k[vb, vh, vi, vd]
                        with T.sblock("length"):
                            length[0] = state[slot, LENGTH] - added[vb] + vi + 1
                        for leaving in T.serial(T.Select(L > R, 1, 0)):
                            with T.sblock("leave"):
                                vl = T.axis.opaque(1, leaving)
                                T.reads(slot, L, page_table[0:S, 0:pages])
                                T.writes(
                                    v_code[0:N, vh, 0 : P // W_v, 0:D],
                                    v_scale[0:N, vh, 0 : D // G_v, 0:P],
                                    v_zero[0:N, vh, 0 : D // G_v, 0:P],
                                )
                                token = T.meta_var(L - 1 - R)
                                v_page = T.sblock_alloc_buffer((1,), "int32")
                                page = T.meta_var(v_page[0])
                                with T.sblock("value_page"):
                                    v_page[0] = page_table[slot, token // P]
                                word = T.sblock_alloc_buffer((D,), "uint32")
                                for d in range(D):
                                    with T.sblock("load_word"):
                                        vd = T.axis.spatial(D, d)
                                        word[vd] = v_code[page, vh, v_order.word(token % P), vd]
                                v_new_scale = T.sblock_alloc_buffer((D // G_v, 1), "float16")
                                v_new_zero = T.sblock_alloc_buffer((D // G_v, 1), "float16")
                                v_new_code = T.sblock_alloc_buffer((1, D), "uint32")
                                with T.sblock("measure"):
                                    T.reads(slot, L)
                                    T.writes(
                                        v_new_scale[0 : D // G_v, 0],
                                        v_new_zero[0 : D // G_v, 0],
                                        v_new_code[0, 0:D],
                                    )
                                    vx = T.sblock_alloc_buffer((1, D), "float32")
                                    for d in range(D):
                                        with T.sblock("load_value"):
                                            vd = T.axis.spatial(D, d)
                                            vx[0, vd] = T.Cast(
                                                "float32", v_ring[slot, vh, token % ring, vd]
                                            )
                                    value_token(vx, v_new_scale, v_new_zero, v_new_code)
                                for d in range(D):
                                    with T.sblock("store_value_code"):
                                        vd = T.axis.spatial(D, d)
                                        at = T.meta_var(
                                            T.Cast("uint32", v_order.shift(v_order.slot(token % P)))
                                        )
                                        # the first token of a word clears what the page held before
                                        v_code[page, vh, v_order.word(token % P), vd] = (
                                            T.Select(
                                                v_order.slot(token % P) == 0, T.uint32(0), word[vd]
                                            )
                                            & ~(T.uint32(v_order.code_mask) << at)
                                        ) | (v_new_code[0, vd] << at)
                                for g in range(D // G_v):
                                    with T.sblock("store_value_scale"):
                                        vg = T.axis.spatial(D // G_v, g)
                                        v_scale[page, vh, vg, token % P] = v_new_scale[vg, 0]
                                        v_zero[page, vh, vg, token % P] = v_new_zero[vg, 0]
                        for d in range(D):
                            with T.sblock("write_value"):
                                vd = T.axis.spatial(D, d)
                                v_ring[slot, vh, (L - 1) % ring, vd] = v_new[vd]
                        for d in range(D):
                            with T.sblock("keep_key"):
                                vd = T.axis.spatial(D, d)
                                T.where(X > 0)
                                k_exact[slot, vh, (L - 1) % T.max(X, 1), vd] = k_new[vd]
                        # one block around both writers of the key ring: an output has one writer
                        with T.sblock("keys"):
                            T.reads(k_new[0:D], page_table[0:S, 0:pages], slot, L)
                            T.writes(
                                k_ring[0:S, vh, 0:ring, 0:D],
                                k_code[0:N, vh, 0 : D // W_k, 0:P],
                                k_scale[0:N, vh, 0 : P // G_k, 0:D],
                                k_zero[0:N, vh, 0 : P // G_k, 0:D],
                            )
                            for d in range(D):
                                with T.sblock("write_key"):
                                    vd = T.axis.spatial(D, d)
                                    k_ring[slot, vh, (L - 1) % ring, vd] = k_new[vd]
                            for g in T.serial(T.Select(L % R == 0, R // G_k, 0)):
                                with T.sblock("flush"):
                                    vf = T.axis.opaque(R // G_k, g)
                                    first = T.meta_var(L - R + vf * G_k)
                                    page = T.meta_var(page_table[slot, first // P])
                                    k_new_scale = T.sblock_alloc_buffer((D,), "float16")
                                    k_new_zero = T.sblock_alloc_buffer((D,), "float16")
                                    k_new_word = T.sblock_alloc_buffer((D // W_k, G_k), "uint32")
                                    with T.sblock("pack"):
                                        T.reads(page_table[0:S, 0:pages], slot, L)
                                        T.writes(
                                            k_new_scale[0:D],
                                            k_new_zero[0:D],
                                            k_new_word[0 : D // W_k, 0:G_k],
                                            k_code[0:N, vh, 0 : D // W_k, 0:P],
                                            k_scale[0:N, vh, 0 : P // G_k, 0:D],
                                            k_zero[0:N, vh, 0 : P // G_k, 0:D],
                                        )
                                        kx = T.sblock_alloc_buffer((G_k, D), "float32")
                                        for t, d in T.grid(G_k, D):
                                            with T.sblock("load_key"):
                                                vt, vd = T.axis.remap("SS", [t, d])
                                                kx[vt, vd] = T.Cast(
                                                    "float32",
                                                    k_ring[slot, vh, (first + vt) % ring, vd],
                                                )
                                        key_group(kx, k_new_scale, k_new_zero, k_new_word)
                                        for w, t in T.grid(D // W_k, G_k):
                                            with T.sblock("store_key_code"):
                                                vw, vt = T.axis.remap("SS", [w, t])
                                                k_code[page, vh, vw, first % P + vt] = k_new_word[
                                                    vw, vt
                                                ]
                                        for d in range(D):
                                            with T.sblock("store_key_scale"):
                                                vd = T.axis.spatial(D, d)
                                                k_scale[page, vh, first % P // G_k, vd] = (
                                                    k_new_scale[vd]
                                                )
                                                k_zero[page, vh, first % P // G_k, vd] = k_new_zero[
                                                    vd
                                                ]
                                    for t, d in T.grid(G_k, D):
                                        with T.sblock("write_back"):
                                            vt, vd = T.axis.remap("SS", [t, d])
                                            T.where(write_back != 0)
                                            k_ring[slot, vh, (first + vt) % ring, vd] = T.Cast(
                                                dtype,
                                                dequantized(
                                                    code_at(
                                                        k_new_word[k_order.word(vd), vt],
                                                        k_order,
                                                        k_order.slot(vd),
                                                    ),
                                                    k_new_scale[vd],
                                                    k_new_zero[vd],
                                                ),
                                            )

    return append
