"""`combine` in threads: one work-group per row and query head, a channel per thread."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.schedules.threads import over_groups, over_last, share, work_group
from kivi_tvm.targets import Hardware


def combine(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `combine` for work-groups."""
    group = work_group(sch, hardware)
    for name in ("start", "add", "out"):
        over_last(sch, sch.get_sblock(name), group)
    share(sch)
    over_groups(sch, sch.get_sblock("head"))
