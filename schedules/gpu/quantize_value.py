"""`quantize_value` in threads: one work-group per word's tokens, a channel per thread."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.schedules.threads import (
    FEW_WARPS,
    WorkGroup,
    over_groups,
    over_last,
    over_spatial,
    over_threads,
    share,
    work_group,
)
from kivi_tvm.targets import Hardware


def quantize_value(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `quantize_value` for work-groups."""
    group = work_group(sch, hardware, FEW_WARPS)
    # what is read twice comes from the cache the second time
    sch.compute_inline(sch.get_sblock("load"))
    value_token(sch, group)
    sch.compute_inline(sch.get_sblock("value_code"))
    over_spatial(sch, sch.get_sblock("word"), group)
    over_last(sch, sch.get_sblock("store_code"), group)
    over_threads(sch, sch.get_sblock("store_scale"), group)
    share(sch)
    over_groups(sch, sch.get_sblock("group"))


def value_token(sch: Schedule, group: WorkGroup) -> None:
    """Schedule the statistics of value tokens, wherever they stand."""
    for name in ("value_range", "value_low", "value_high", "value_probe"):
        over_spatial(sch, sch.get_sblock(name), group)
    for name in ("value_scale", "value_zero", "value_edge", "value_base"):
        over_threads(sch, sch.get_sblock(name), group)
