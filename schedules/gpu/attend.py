"""`attend` in threads: one work-group per work item and tile of query rows of a KV head."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.cuda import MIN_BLOCKS
from kivi_tvm.schedules import Offers
from kivi_tvm.schedules.gpu import attend_half
from kivi_tvm.schedules.primitives import divisors, has_block
from kivi_tvm.schedules.threads import (
    WARPS,
    WORDS,
    contract_by_threads,
    over_groups,
    over_threads,
    reduce_by_warps,
    share,
    work_group,
)
from kivi_tvm.targets import Hardware

INLINE = "key_zero", "key_scale", "value_zero", "value_scale"
ELEMENTWISE = (
    "page", "q_scaled", "start_stat", "start_acc", "q_key", "score", "prob", "p_fold", "chunk_acc",
    "new_stat", "new_sum", "new_acc", "keep_stat", "keep_acc", "store_stat", "store_acc",
)  # fmt: skip
REDUCED = "q_zero", "max", "sum", "p_zero"

CHUNK_TOKENS = 128
ROW_TILES = 1, 2, 4  # more would spill registers


def offers(key: KernelKey, hardware: Hardware) -> Offers:
    """Rows of a tile share the codes they load, and the shared memory of a work-group."""
    if key.compute == "half":
        return attend_half.offers(key, hardware)
    pages = divisors(key.split_tokens // key.page_size, max(1, CHUNK_TOKENS // key.page_size))
    chunk = pages[-1] * key.page_size
    fits = [n for n in ROW_TILES if shared_bytes(key, hardware, n, chunk) <= hardware.shared_bytes]
    options = sorted({min(n, key.rows) for n in fits})
    return {"chunk_tokens": ([chunk], chunk), "row_tile": (options, options[-1])}


def min_blocks(key: KernelKey, hardware: Hardware) -> int:
    """In mode "half" by what its warps take."""
    return attend_half.min_blocks(key, hardware) if key.compute == "half" else MIN_BLOCKS


def beginning(key: KernelKey, extends: bool) -> str:
    """What comes next attends to the window meanwhile, which was written before.

    In mode "half" it begins itself while `append` runs, which has waited for the queries. What is
    before `extend_attend` may just have written those; and mode "float" has no wait within.
    """
    return "within" if key.compute == "half" and not extends else "release"


def shared_bytes(key: KernelKey, hardware: Hardware, rows: int, chunk: int) -> int:
    """Shared memory of a work-group for so many rows and tokens at once."""
    D, N_k, N_v = key.head_dim, chunk // key.key_group_size, key.head_dim // key.value_group_size
    slices = 2 * WARPS * hardware.warp * WORDS  # of keys and of values
    return 4 * rows * (D * (4 + N_k) + chunk * (2 + N_v) + slices)


def attend(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `attend` for work-groups."""
    if has_block(sch, "warp"):
        attend_half.attend_half(sch, hardware)
        return
    group = work_group(sch, hardware)
    for name in INLINE:
        sch.compute_inline(sch.get_sblock(name))
    for name in ELEMENTWISE:
        over_threads(sch, sch.get_sblock(name), group)
    for name in REDUCED:
        reduce_by_warps(sch, sch.get_sblock(name), group)
    for name, words, consumer in (
        ("dot", "key_word", "score"),
        ("out", "value_word", "chunk_acc"),
    ):
        block, load, result = map(sch.get_sblock, (name, words, consumer))
        contract_by_threads(sch, block, load, result, group)
    share(sch)
    over_groups(sch, sch.get_sblock("split"))
