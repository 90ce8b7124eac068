"""`fill_window` in threads: one work-group per token, a channel per thread."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.schedules.threads import FEW_WARPS, over_groups, over_last, work_group
from kivi_tvm.targets import Hardware


def fill_window(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `fill_window` for work-groups."""
    group = work_group(sch, hardware, FEW_WARPS)
    for name in ("value", "key"):
        over_last(sch, sch.get_sblock(name), group)
    over_groups(sch, sch.get_sblock("token"))
