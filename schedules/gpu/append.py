"""`append` in threads: one work-group per row and KV head, a channel per thread.

A thread meets the same channels in every block that reads or writes the rings and codes: what it
reads back there, it has written itself.
"""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.schedules.choices import choose
from kivi_tvm.schedules.gpu.quantize_key import key_group
from kivi_tvm.schedules.gpu.quantize_value import value_token
from kivi_tvm.schedules.threads import (
    WorkGroup,
    keep_local,
    over_groups,
    over_last,
    over_threads,
    share,
)
from kivi_tvm.targets import Hardware

BY_CHANNEL = (
    "load_new_value", "load_new_key", "load_value", "value_code", "load_word", "store_value_code",
    "write_value", "keep_key", "write_key", "store_key_scale", "write_back",
)  # fmt: skip
SCALARS = "slot", "length", "value_page"
LOADED = "load_new_value", "load_new_key", "load_word"  # into registers, which wait for no store
# Of many rows a GPU holds the more at once: 438 with 8 KV heads take 7 us on an H100 instead of 12,
# one takes 0.1 us longer than with two.
WARPS = 1, 2


def beginning(key: KernelKey, extends: bool) -> str:
    """`attend` begins with tokens that were packed before."""
    del key, extends
    return "release"


def min_blocks(key: KernelKey, hardware: Hardware) -> int:
    """As many as hide what a row waits for: the loads of what it overwrites."""
    del key, hardware
    return 16


def append(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `append` for work-groups."""
    group = WorkGroup(choose(sch, "warps", WARPS, WARPS[0]), hardware.warp)
    # what is read twice comes from the cache the second time
    sch.compute_inline(sch.get_sblock("load_key"))
    value_token(sch, group)
    key_group(sch, group)
    for name in SCALARS:
        keep_local(sch, name)
    for name in BY_CHANNEL:
        over_last(sch, sch.get_sblock(name), group)
    for name in LOADED:
        sch.set_scope(sch.get_sblock(name), 0, "local")
    for name in ("store_value_scale", "store_key_code"):
        over_threads(sch, sch.get_sblock(name), group)
    share(sch)
    over_groups(sch, sch.get_sblock("row"))
