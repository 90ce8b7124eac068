"""Cases: the arguments on which candidates of a task are checked and timed."""

from __future__ import annotations

from collections.abc import Callable

from kivi_tvm.cache_key import CODE_SOURCES
from kivi_tvm.tune.candidate import Task
from kivi_tvm.tune.cases import attention, merge, storage
from kivi_tvm.tune.cases.case import Case

__all__ = ["CASE_SOURCES", "Case", "make_case"]

# What decides a candidate's code, its arguments and the results that are expected of it.
CASE_SOURCES = (*CODE_SOURCES, "reference", "workloads.py", "tune/cases", "tune/pools.py")

_MAKERS: dict[str, Callable[[Task], Case]] = {
    "advance": storage.advance,
    "append": storage.append,
    "attend": attention.attend,
    "attend_batch": merge.attend_batch,
    "attend_window": attention.attend_window,
    "combine": merge.combine,
    "combine_batch": merge.combine_batch,
    "combine_few": merge.combine_few,
    "combine_window": merge.combine_window,
    "dequantize_key": storage.dequantize_key,
    "dequantize_value": storage.dequantize_value,
    "extend_attend": attention.attend,
    "extend_new": attention.extend_new,
    "extend_window": attention.attend_window,
    "fill_window": storage.fill_window,
    "quantize_key": storage.quantize_key,
    "quantize_value": storage.quantize_value,
}


def make_case(task: Task) -> Case:
    """The case of a task: small ragged calls with the reference's results, and what is timed.

    Parameters
    ----------
    task : Task

    Returns
    -------
    Case

    Raises
    ------
    ValueError
        The function has no case, or it has nothing to do on the task's workload.
    """
    if task.function not in _MAKERS:
        raise ValueError(f"`function` must be one of {sorted(_MAKERS)}, got {task.function!r}")
    return _MAKERS[task.function](task)
