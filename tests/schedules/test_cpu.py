"""CPU schedules: threads around the rows and splits, lanes within, for narrow and wide SIMD."""

import random
import re

import pytest
import tvm
from configurations import CONFIGS, POINTS, config, config_id
from tvm.s_tir import Schedule

from kivi_tvm import targets
from kivi_tvm.compile import scheduled_function
from kivi_tvm.ops import FUNCTIONS, OPS
from kivi_tvm.schedules import rule
from kivi_tvm.targets import Hardware

TARGET = targets.resolve("native")
NARROW, WIDE = Hardware("cpu", 128, 16), Hardware("cpu", 512, 32)
SERIAL = {"advance"}  # one short loop
INSPECTION = {"dequantize_key", "dequantize_value"}  # scheduled for threads alone
SCHEDULED = sorted({op for op, _ in FUNCTIONS.values()})


def scheduled(name, cfg, hardware):
    function = OPS[name](cfg.kernel_key()).with_attr("global_symbol", name)
    schedule = Schedule(tvm.IRModule({name: function}))
    schedule.work_on(name)
    rule(name, hardware)(schedule, hardware)
    return schedule.mod[name]


def loops(function, kind):
    """The extents of all loops of a kind, as TVM prints them."""
    return re.findall(rf" in T\.{kind}\((.*)\):", function.script())


@pytest.mark.parametrize("hardware", [NARROW, WIDE], ids=lambda h: f"{h.vector_bits}bit")
@pytest.mark.parametrize("name", SCHEDULED)
def test_threads_and_lanes(name, hardware):
    cfg = config(POINTS[13])
    found = scheduled(name, cfg, hardware)
    assert len(loops(found, "parallel")) == (name not in SERIAL)
    if name not in SERIAL | INSPECTION:
        extents = set(map(int, loops(found, "vectorized")))
        assert extents and all(extent % 4 == 0 for extent in extents)
        assert max(extents) <= 4 * hardware.float32_lanes
    assert not loops(found, "thread_binding")


@pytest.mark.parametrize("cfg", CONFIGS[::6], ids=config_id)
def test_narrow_registers(cfg):
    """Every operator can be scheduled for 128 bits, whatever the shape."""
    for name in SCHEDULED:
        scheduled(name, cfg, NARROW)


@pytest.mark.parametrize("cfg", CONFIGS[::8], ids=config_id)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_decisions_can_be_scheduled(name, cfg):
    generator = random.Random(name)
    offered = scheduled_function(name, cfg.kernel_key(), TARGET).choices
    decisions = {choice: generator.choice(x.options) for choice, x in offered.items()}
    found = scheduled_function(name, cfg.kernel_key(), TARGET, decisions).choices
    assert {choice: x.taken for choice, x in found.items()} == decisions


def test_an_operator_without_a_schedule():
    with pytest.raises(ModuleNotFoundError, match=r"schedules\.cpu\.extend"):
        rule("extend", NARROW)
    with pytest.raises(ModuleNotFoundError, match=r"schedules\.npu"):
        rule("attend", Hardware("npu", 128, 16))
