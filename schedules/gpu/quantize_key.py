"""`quantize_key` in threads: one work-group per group of tokens, a channel per thread."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.schedules.threads import (
    WorkGroup,
    over_groups,
    over_last,
    over_spatial,
    over_threads,
    share,
    work_group,
)
from kivi_tvm.targets import Hardware


def quantize_key(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `quantize_key` for work-groups."""
    group = work_group(sch, hardware)
    # what is read twice comes from the cache the second time
    sch.compute_inline(sch.get_sblock("load"))
    key_group(sch, group)
    over_threads(sch, sch.get_sblock("store_code"), group)
    over_last(sch, sch.get_sblock("store_scale"), group)
    share(sch)
    over_groups(sch, sch.get_sblock("group"))


def key_group(sch: Schedule, group: WorkGroup) -> None:
    """Schedule the blocks of one key group, wherever they stand: a thread per channel, then word.

    Codes are made where they go into a word.
    """
    for name in ("key_code", "key_place"):
        sch.compute_inline(sch.get_sblock(name))
    for name in ("key_range", "key_word"):
        over_spatial(sch, sch.get_sblock(name), group)
    for name in ("key_scale", "key_zero", "key_edge", "key_base"):
        over_last(sch, sch.get_sblock(name), group)
