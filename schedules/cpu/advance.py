"""`advance` on a CPU: a few integers per row, not worth a thread."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.targets import Hardware


def advance(sch: Schedule, hardware: Hardware) -> None:
    """Leave `advance` as written: one short loop."""
