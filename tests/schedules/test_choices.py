"""Choices: defaults on a plain schedule, decisions on a guided one, and errors that name them."""

import pytest
from tvm.s_tir import Schedule
from tvm.script import tirx as T

from kivi_tvm.schedules.choices import Choice, GuidedSchedule, choose


@T.prim_func(s_tir=True)
def copy(a: T.handle, b: T.handle):
    A = T.match_buffer(a, (8,), "float32")
    B = T.match_buffer(b, (8,), "float32")
    for i in range(8):
        with T.sblock("copy"):
            vi = T.axis.spatial(8, i)
            B[vi] = A[vi]


def test_a_plain_schedule_takes_defaults():
    schedule = Schedule(copy)
    assert choose(schedule, "width", [1, 2, 4], 2) == 2
    assert choose(schedule, "order", ["rows", "columns"], "rows") == "rows"


def test_a_guided_schedule_takes_decisions_and_remembers_choices():
    schedule = GuidedSchedule(copy, {"width": 4, "depth": 1})
    assert choose(schedule, "width", [1, 2, 4], 2) == 4
    assert choose(schedule, "order", ["rows", "columns"], "rows") == "rows"
    assert schedule.choices == {
        "width": Choice((1, 2, 4), 2, 4),
        "order": Choice(("rows", "columns"), "rows", "rows"),
    }
    assert schedule.unused() == ("depth",)


@pytest.mark.parametrize("taken", [1, 4])
def test_the_trace_keeps_what_was_taken(taken):
    schedule = GuidedSchedule(copy, {"width": taken})
    choose(schedule, "width", [1, 2, 4], 2)
    (decision,) = schedule.trace.decisions.values()
    assert [1, 2, 4][int(decision)] == taken


def test_errors_name_the_choice():
    with pytest.raises(ValueError, match=r"`default` of width must be one of \[1, 2\], got 3"):
        choose(Schedule(copy), "width", [1, 2], 3)
    with pytest.raises(ValueError, match=r"`decision` of width must be one of \[1, 2\], got 5"):
        choose(GuidedSchedule(copy, {"width": 5}), "width", [1, 2], 2)
    twice = GuidedSchedule(copy)
    choose(twice, "width", [1, 2], 2)
    with pytest.raises(ValueError, match="unique in a schedule, got 'width' twice"):
        choose(twice, "width", [1, 2], 2)
