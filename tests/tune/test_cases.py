"""Every function's case accepts the default kernel and rejects wrong ones."""

import ctypes
from dataclasses import replace

import pytest
import torch
from ops.plain import plain_kernel
from tune.tasks import HALF, TINY, WIDE, library

from kivi_tvm.ops import ALL_FUNCTIONS, FUNCTIONS
from kivi_tvm.tune.candidate import Task
from kivi_tvm.tune.cases import make_case
from kivi_tvm.tune.measure import TimedCall, Wrong, check_call

WORKLOADS = {
    "fp32": TINY,
    "fp16": HALF,
    "bf16": pytest.param(WIDE, marks=pytest.mark.slow),
}
# The argument that a function writes and that most of its calls fill.
WRITTEN = {
    "advance": 0,
    "append": 6,
    "attend": -2,
    "attend_window": -2,
    "combine": -1,
    "dequantize_key": -1,
    "dequantize_value": -1,
    "extend_attend": -2,
    "extend_new": -2,
    "extend_window": -2,
    "fill_window": 3,
    "quantize_key": 1,
    "quantize_value": 1,
}


def rejects(case, kernel):
    """Whether some call of the check finds the kernel wrong."""
    for call in case.check:
        try:
            check_call(kernel, call.to_dict(), "cpu")
        except Wrong:
            return True
    return False


def perturbed(kernel, number, factor=1.001):
    """The kernel, its results off by a thousandth or more, or by one where they are integers."""

    def run(*arguments):
        kernel(*arguments)
        x = torch.from_dlpack(arguments[number])
        x.copy_(x + 1 if x.dtype == torch.int32 else x * factor)

    return run


def without_last_head(kernel, number):
    """The kernel, the last element of its output put back to what it was."""

    def run(*arguments):
        x = torch.from_dlpack(arguments[number])
        last = x[:, -1:] if x.ndim > 2 else x
        before = last.clone()
        kernel(*arguments)
        last.copy_(before)

    return run


def writes_outside(kernel, number, offset):
    """The kernel, and one byte next to its output."""

    def run(*arguments):
        kernel(*arguments)
        x = torch.from_dlpack(arguments[number])
        end = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        where = x.data_ptr() + (end * x.element_size() if offset else -1)
        ctypes.memset(where, 0x77, 1)

    return run


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_accepts_the_default_kernel_and_rejects_wrong_ones(function, workload):
    case = make_case(Task(function, workload))
    kernel, number = library(workload)[function], WRITTEN[function]
    assert not rejects(case, kernel)
    assert rejects(case, lambda *arguments: None)
    assert rejects(case, perturbed(kernel, number))
    assert rejects(case, without_last_head(kernel, number))
    assert rejects(case, writes_outside(kernel, number, offset=0))
    assert rejects(case, writes_outside(kernel, number, offset=1))


@pytest.mark.parametrize(
    "function",
    [
        "append",
        "attend",
        "attend_batch",
        "extend_attend",
        "combine",
        "combine_batch",
        "combine_few",
        "combine_window",
    ],
)
def test_functions_of_gpus(function):
    """In mode "half", whose splits depend on a row's length; the operators as they are."""
    workload = replace(HALF, num_heads=8, num_kv_heads=2, compute="half")
    key = workload.cfg.kernel_key()
    op, extends = ALL_FUNCTIONS[function]
    case = make_case(Task(function, workload))
    kernel = plain_kernel(op, replace(key, rows_per_query=key.extend_rows) if extends else key)
    number = WRITTEN.get(function, -1)
    assert not rejects(case, kernel)
    assert rejects(case, perturbed(kernel, number, 1.01))
    assert rejects(case, without_last_head(kernel, number))
    for call in case.timed:
        assert min(TimedCall(call.to_dict(), "cpu").run(kernel, 2)) > 0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_input_that_is_written_is_seen(function):
    case = make_case(Task(function, TINY))
    kernel = library(TINY)[function]

    def run(*arguments):
        kernel(*arguments)
        tensors = [x for x in arguments if hasattr(x, "shape") and x.dtype == "int32"]
        ctypes.memset(torch.from_dlpack(tensors[-1]).data_ptr(), 0x77, 1)

    assert rejects(case, run)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_timed_calls_run_on_the_workload(function):
    workload = HALF
    case = make_case(Task(function, workload))
    assert case.nbytes > 0
    assert sum(call.weight for call in case.timed) == pytest.approx(1)
    for call in case.timed:
        times = TimedCall(call.to_dict(), "cpu").run(library(workload)[function], 3)
        assert len(times) == 3 and min(times) > 0


def test_errors():
    with pytest.raises(ValueError, match="got 'absent'"):
        make_case(Task("absent", TINY))
    with pytest.raises(ValueError, match="`tokens` must exceed residual_length=128 for attend"):
        make_case(Task("attend", replace(TINY, tokens=100)))
