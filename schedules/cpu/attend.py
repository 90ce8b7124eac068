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
    divisors,
    parallelize,
    reduce_by_lanes,
    vectorize_last,
)
from kivi_tvm.targets import Hardware

# Rows x vectors of accumulators: 4 x 2 leave room for codes and operands in 32 registers.
TILE = 4, 2

ELEMENTWISE = (
    "q_scaled", "start_acc", "key_zero", "key_scale", "q_key", "prob", "value_zero", "value_scale",
    "p_fold", "new_acc", "keep_acc", "store_acc",
)  # fmt: skip

ELEMENTWISE_IN_INTEGERS = "q_quad", "score", "p_order", "p_quad", "chunk_acc"
REDUCED = "q_zero", "max", "sum", "p_zero"
REDUCED_IN_INTEGERS = "q_peak", "p_peak"

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
        "prefetch": (["none", "values", "next"], "next"),
    }


def attend(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `attend` for SIMD lanes and threads."""
    lanes, integers = hardware.float32_lanes, in_integers(sch)
    # 1. contractions: codes are unpacked in registers, once for all rows of a tile
    if integers:
        for name, codes in (("dot", "k_quad"), ("out", "v_quad")):
            contract_bytes_in_registers(sch, name, codes, TILE, lanes, hardware.byte_dot)
    else:
        contract_in_registers(sch, sch.get_sblock("dot"), sch.get_sblock("score"), TILE, lanes)
        contract_in_registers(sch, sch.get_sblock("out"), sch.get_sblock("chunk_acc"), TILE, lanes)
    # 2. reductions by lanes
    width = choose_width(sch, "reduced", lanes)
    for name in (*REDUCED, *(REDUCED_IN_INTEGERS if integers else ())):
        reduce_by_lanes(sch, sch.get_sblock(name), width)
    # 3. elementwise stages
    width = choose_width(sch, "elementwise", lanes)
    for name in (*ELEMENTWISE, *(ELEMENTWISE_IN_INTEGERS if integers else ())):
        vectorize_last(sch, sch.get_sblock(name), width)
    # 4. threads
    parallelize(sch, sch.get_sblock("split"))


def in_integers(sch: Schedule) -> bool:
    """Tell whether the function's compute mode is one of integers."""
    (function,) = sch.mod.functions.values()
    return COMPUTE_ATTR in function.attrs
