"""`dequantize_key` in threads: a channel per thread."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.schedules.threads import over_tokens
from kivi_tvm.targets import Hardware


def dequantize_key(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `dequantize_key` for work-groups."""
    over_tokens(sch, sch.get_sblock("dequantize"), hardware)
