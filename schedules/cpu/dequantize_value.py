"""`dequantize_value` on a CPU: threads over tokens."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.targets import Hardware


def dequantize_value(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `dequantize_value` for threads."""
    del hardware  # an inspection path: threads are enough
    *token, _channel = sch.get_loops(sch.get_sblock("dequantize"))
    sch.parallel(sch.fuse(*token))
