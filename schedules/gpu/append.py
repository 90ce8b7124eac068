"""`append` in threads: one work-group per row and KV head, a channel per thread.

A thread meets the same channels in every block that reads or writes the rings and codes: what it
reads back there, it has written itself.
"""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.schedules.gpu.quantize_key import key_group
from kivi_tvm.schedules.gpu.quantize_value import value_token
from kivi_tvm.schedules.threads import over_groups, over_last, over_threads, share, work_group
from kivi_tvm.targets import Hardware

BY_CHANNEL = (
    "load_value", "value_code", "load_word", "store_value_code", "write_value", "keep_key",
    "write_key", "store_key_scale", "write_back",
)  # fmt: skip


def beginning(key: KernelKey, extends: bool) -> str:
    """`attend` begins with tokens that were packed before."""
    del key, extends
    return "release"


def append(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `append` for work-groups."""
    group = work_group(sch, hardware)
    # what is read twice comes from the cache the second time
    sch.compute_inline(sch.get_sblock("load_key"))
    value_token(sch, group)
    key_group(sch, group)
    for name in BY_CHANNEL:
        over_last(sch, sch.get_sblock(name), group)
    for name in ("store_value_scale", "store_key_code"):
        over_threads(sch, sch.get_sblock(name), group)
    share(sch)
    over_groups(sch, sch.get_sblock("row"))
