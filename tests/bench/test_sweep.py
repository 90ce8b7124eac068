"""Sweeps: all combinations, ragged rows that never change, modes that the bits allow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kivi_tvm import targets
from kivi_tvm.bench import ours, sweep
from kivi_tvm.bench.sweep import Axes
from kivi_tvm.errors import UserError
from kivi_tvm.workloads import MODELS

BASE = MODELS["llama3-8b"]


def test_cross_product_changes_tokens_fastest():
    axes = Axes(tokens=[512, 1024], queries_per_kv=[1, 8], bits=[4])
    made = sweep.workloads(BASE, axes)
    assert [each.id for each in made] == [
        "B1-H32-Hkv32-T512-D128-b4-G32",
        "B1-H32-Hkv32-T1024-D128-b4-G32",
        "B1-H32-Hkv4-T512-D128-b4-G32",
        "B1-H32-Hkv4-T1024-D128-b4-G32",
    ]
    values = {"tokens": 1024, "batch_size": 1, "queries_per_kv": 8, "head_dim": 128}
    assert sweep.values(made[-1]) == {**values, "bits": 4, "group_size": 32}


def test_no_axes_leave_the_model():
    assert sweep.workloads(BASE, Axes()) == [BASE]


def test_ragged_rows_lie_between_100_and_all_tokens():
    (made,) = sweep.workloads(BASE, Axes(tokens=[8192], batch_size=[16]), ragged=True)
    assert (max(made.lengths), min(made.lengths), len(made.lengths)) == (8192, 100, 16)
    assert sweep.workloads(BASE, Axes(tokens=[8192], batch_size=[16]), ragged=True) == [made]
    assert sweep.lengths(16, 8192, seed=1) != made.lengths


def test_ragged_rows_need_room():
    with pytest.raises(UserError, match="`tokens` must be above 100 for ragged rows, got 100"):
        sweep.lengths(2, 100)


def test_modes_are_run_once_and_marked():
    auto = targets.kernel_key(BASE.cfg, targets.resolve("native")).compute
    assert ours.modes(BASE) == {mode: mode == auto for mode in ours.modes(BASE)}
    assert set(ours.modes(BASE)) == {"float", "int8x2", "int8"}
    assert set(ours.modes(replace(BASE, value_bits=8))) == {"float"}
    assert ours.modes(BASE, ["auto"]) == {auto: True}
    assert ours.modes(BASE, ["int8", "auto"])[auto]
    assert ours.modes(BASE, [auto]) == {auto: False}
