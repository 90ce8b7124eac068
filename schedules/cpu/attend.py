"""`attend` on a CPU: one thread per work item and head, register tiles over SIMD lanes."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.attend import COMPUTE_ATTR
from kivi_tvm.schedules import Offers
from kivi_tvm.schedules.primitives import (
    choose_width,
    contract_bytes_in_registers,
    contract_in_registers,
    dot_by_lanes,
    order_bytes,
    sum_bytes,
    sum_products,
    divisors,
    parallelize,
    reduce_by_lanes,
    split_off,
    vectorize_last,
)
from kivi_tvm.schedules.spread import spread
from kivi_tvm.targets import Hardware

# Rows x vectors of accumulators: 4 x 2 leave room for codes and operands in 32 registers.
TILE = 4, 2

ELEMENTWISE = "q_scaled", "start_acc", "prob", "new_acc", "keep_acc", "store_acc"
IN_FLOAT = "key_zero", "key_scale", "q_key", "value_zero", "value_scale", "p_fold"
IN_INTEGERS = "key_scale", "q_gained", "value_scale"
ORDERED = "q_fold", "key_order", "value_order", "p_order"
REDUCED = "max", "sum"
REDUCED_IN_FLOAT = "q_zero", "p_zero"
REDUCED_IN_INTEGERS = "q_peak", "q_base", "p_base"
FETCH_K = "fetch_k_code", "fetch_k_scale", "fetch_k_zero"
FETCH_V = "fetch_v_code", "fetch_v_scale", "fetch_v_zero"

MAX_CHUNK_TOKENS = 512
MAX_CHUNK_SCORES = 16384  # float32 numbers, of which there are four per score: a quarter of an L2


def offers(key: KernelKey) -> Offers:
    """Longer chunks have fewer ends; their scores take more cache.

    Hints to fetch memory gain where the cache is cold, as a model's is: on two cores of a Zen 4 at
    8192 tokens 1.05 times at D=128, M=4 in every compute mode, nothing at M=1, and where the best
    tiles are found beside them up to 1.5 times. A warm cache only pays for them.
    """
    most = min(MAX_CHUNK_TOKENS, MAX_CHUNK_SCORES // key.rows)
    pages = divisors(key.split_tokens // key.page_size, max(1, most // key.page_size))
    options = sorted({key.chunk_tokens, *(n * key.page_size for n in pages)})
    return {
        "chunk_tokens": (options, key.chunk_tokens),
        "prefetch": (["none", "next"], "next"),
        "unpack": (["shift", "mask"], "mask"),
    }


def attend(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `attend` for SIMD lanes and threads."""
    lanes, integers = hardware.float32_lanes, in_integers(sch)
    # 1. contractions: codes are unpacked in registers, once for all rows of a tile
    if integers:
        sch.compute_inline(sch.get_sblock("p_fold"))
        keys, values = (
            contract_bytes_in_registers(sch, blocks, TILE, lanes, hardware.byte_dot)
            for blocks in (
                ("k_quad", "dot", "product", "score"),
                ("v_quad", "out", "product_out", "chunk_acc"),
            )
        )
    else:
        contract_in_registers(sch, sch.get_sblock("dot"), sch.get_sblock("score"), TILE, lanes)
        contract_in_registers(sch, sch.get_sblock("out"), sch.get_sblock("chunk_acc"), TILE, lanes)
    # 2. reductions by lanes
    width = choose_width(sch, "reduced", lanes)
    for name in (*REDUCED, *(REDUCED_IN_INTEGERS if integers else REDUCED_IN_FLOAT)):
        reduce_by_lanes(sch, sch.get_sblock(name), width)
    if integers:
        reduce_over_columns(sch, sch.get_sblock("key_top"), lanes)
        dot_by_lanes(sch, sch.get_sblock("p_peak"), 16, lanes)
        for name in ("q_total", "p_total"):
            sum_bytes(sch, sch.get_sblock(name), (4, 4), hardware.byte_dot)
        for name, operand in (("q_part", "key_mid"), ("p_part", "value_mid")):
            sum_products(sch, sch.get_sblock(name), sch.get_sblock(operand), (4, 4))
        for name in ("q_quad", "p_quad"):
            plane, row, column, lane = sch.get_loops(sch.get_sblock(name))
            step, lane = split_off(sch, lane, lanes)
            row_tile, row = split_off(sch, row, 4)
            sch.reorder(row_tile, column, step, plane, row, lane)
            sch.unroll(plane)
            sch.unroll(row)
            sch.vectorize(lane)
        for name in ORDERED:
            order_bytes(sch, sch.get_sblock(name), lanes)
    # 3. elementwise stages
    width = choose_width(sch, "elementwise", lanes)
    for name in (*ELEMENTWISE, *(IN_INTEGERS if integers else IN_FLOAT)):
        vectorize_last(sch, sch.get_sblock(name), width)
    # 4. memory of the next chunk, spread over this one's work
    if has_block(sch, FETCH_K[0]):
        spread(sch, FETCH_K, keys)
        spread(sch, FETCH_V, values)
    # 5. threads
    parallelize(sch, sch.get_sblock("split"))


def has_block(sch, name):
    try:
        sch.get_sblock(name)
        return True
    except Exception:
        return False


def reduce_over_columns(sch, block, lanes):
    axis, step = sch.get_loops(block)[-2:]
    outer, lane = split_off(sch, axis, lanes)
    sch.reorder(outer, step, lane)
    sch.vectorize(lane)
    start = sch.decompose_reduction(block, step)
    sch.vectorize(sch.get_loops(start)[-1])


def in_integers(sch: Schedule) -> bool:
    """Tell whether the function's compute mode is one of integers."""
    (function,) = sch.mod.functions.values()
    return COMPUTE_ATTR in function.attrs
