"""`attend_new` in threads: the blocks of `attend_window`, and so its schedule."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.schedules import Offers
from kivi_tvm.schedules.gpu.attend_window import attend_window, fitting_rows
from kivi_tvm.targets import Hardware


def offers(key: KernelKey, hardware: Hardware) -> Offers:
    """Rows of a tile share what they load, and the shared memory of a work-group."""
    return {"row_tile": fitting_rows(key, hardware)}


def attend_new(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `attend_new` for work-groups."""
    attend_window(sch, hardware)
