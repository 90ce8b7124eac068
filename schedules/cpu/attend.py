"""`attend` on a CPU: one thread per work item and head, register tiles over SIMD lanes."""

from __future__ import annotations

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.attend import COMPUTE_ATTR, FETCH_KEYS, FETCH_VALUES
from kivi_tvm.schedules import Offers
from kivi_tvm.schedules.byte_dot import UNSIGNED
from kivi_tvm.schedules.byte_tiles import (
    ByteBlocks,
    contract_bytes,
    make_quads,
    sum_bytes,
    sum_products,
)
from kivi_tvm.schedules.primitives import (
    choose_width,
    divisors,
    has_block,
    parallelize,
    reduce_by_lanes,
    reduce_over_rows,
    vectorize_last,
)
from kivi_tvm.schedules.spread import spread
from kivi_tvm.schedules.tiles import contract_in_registers, dot_by_lanes
from kivi_tvm.targets import Hardware

ELEMENTWISE = "q_scaled", "start_acc", "prob", "new_acc", "keep_acc", "store_acc"
IN_FLOAT = "key_zero", "key_scale", "q_key", "value_zero", "value_scale", "p_fold"
IN_INTEGERS = "key_scale", "q_gained", "value_scale"
REDUCED = "max", "sum"

MAX_CHUNK_TOKENS = 512
MAX_CHUNK_SCORES = 16384  # float32 numbers, of which there are four per score: a quarter of an L2


def offers(key: KernelKey, hardware: Hardware) -> Offers:
    """Longer chunks have fewer ends; their scores take more cache.

    Hints to fetch memory decide about a cold cache, as a model's is: on two cores of a Zen 4 at
    32768 tokens, D=128, M=4, 2 bits they make `attend` 1.3 (float) to 1.9 times (int8) faster, to
    within a tenth of its speed on a warm cache, which loses 2% by them.
    """
    most = min(MAX_CHUNK_TOKENS, MAX_CHUNK_SCORES // key.rows)
    pages = divisors(key.split_tokens // key.page_size, max(1, most // key.page_size))
    options = sorted({key.chunk_tokens, *(n * key.page_size for n in pages)})
    masks = key.compute != "float" and hardware.byte_dot in UNSIGNED
    return {
        "chunk_tokens": (options, key.chunk_tokens),
        "prefetch": (["none", "next"], "next"),
        "unpack": (["shift", "mask"], "mask") if masks else (["shift"], "shift"),
    }


def attend(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `attend` for SIMD lanes and threads."""
    lanes = hardware.float32_lanes
    # 1. contractions, with what they need
    contract = in_integers if computes_in_integers(sch) else in_float
    keys, values = contract(sch, hardware)
    # 2. softmax and sums over chunks
    width = choose_width(sch, "reduced", lanes)
    for name in REDUCED:
        reduce_by_lanes(sch, sch.get_sblock(name), width)
    width = choose_width(sch, "elementwise", lanes)
    for name in ELEMENTWISE:
        vectorize_last(sch, sch.get_sblock(name), width)
    # 3. the next chunk's memory, asked for between this one's tiles
    if has_block(sch, FETCH_KEYS[0]):
        spread(sch, FETCH_KEYS, keys)
        spread(sch, FETCH_VALUES, values)
    # 4. threads
    parallelize(sch, sch.get_sblock("split"))


def computes_in_integers(sch: Schedule) -> bool:
    """Tell whether the function's compute mode is one of integers."""
    (function,) = sch.mod.functions.values()
    return COMPUTE_ATTR in function.attrs


def in_float(sch: Schedule, hardware: Hardware) -> tuple[list[LoopRV], list[LoopRV]]:
    """Schedule contractions in float32; the loops around tiles of keys and of values.

    Codes are unpacked in registers, once for all rows of a tile.
    """
    lanes, tile = hardware.float32_lanes, tile_of(hardware)
    for name in ("key_word", "value_word"):
        sch.compute_inline(sch.get_sblock(name))
    loops = [
        contract_in_registers(sch, sch.get_sblock(name), sch.get_sblock(result), (4, 2), lanes)
        for name, result in (("dot", "score"), ("out", "chunk_acc"))
    ]
    for name in ("q_zero", "p_zero"):
        dot_by_lanes(sch, sch.get_sblock(name), tile[0] * tile[1] * 2, lanes)
    for name in IN_FLOAT:
        vectorize_last(sch, sch.get_sblock(name), lanes)
    return loops[0], loops[1]


def in_integers(sch: Schedule, hardware: Hardware) -> tuple[list[LoopRV], list[LoopRV]]:
    """Schedule contractions of bytes; the loops around tiles of keys and of values."""
    lanes, kind, tile = hardware.float32_lanes, hardware.byte_dot, tile_of(hardware)
    # 1. codes times quads
    keys = contract_bytes(sch, ByteBlocks("k_quad", "dot", "dots", "score"), tile, lanes, kind)
    values = contract_bytes(
        sch, ByteBlocks("v_quad", "out", "outs", "chunk_acc"), tile, lanes, kind
    )
    # 2. units of what becomes quads
    reduce_over_rows(sch, sch.get_sblock("key_top"), lanes)
    reduce_by_lanes(sch, sch.get_sblock("q_peak"), lanes)
    sch.compute_inline(sch.get_sblock("p_fold"))
    square = tile[0], tile[0]
    dot_by_lanes(sch, sch.get_sblock("p_peak"), square[0] * square[1], lanes)
    # 3. quads
    for name in ("q_quad", "p_quad"):
        make_quads(sch, sch.get_sblock(name), tile[0], lanes)
    # 4. what does not depend on codes
    for name, operand in (("q", "key_mid"), ("p", "value_mid")):
        sum_bytes(sch, sch.get_sblock(f"{name}_total"), square, lanes, kind)
        products = sch.get_sblock(f"{name}_part")
        sum_products(sch, products, sch.get_sblock(operand), square, lanes)
        reduce_by_lanes(sch, sch.get_sblock(f"{name}_base"), lanes)
    for name in IN_INTEGERS:
        vectorize_last(sch, sch.get_sblock(name), lanes)
    return keys, values


def tile_of(hardware: Hardware) -> tuple[int, int]:
    """Rows x vectors of accumulators that leave room for codes, operands and sums over places."""
    return (4, 2) if hardware.vector_registers >= 32 else (2, 2)
