"""Spaces: planted ones point by point, and those of the schedules that ship."""

import random

import pytest
from landscapes import branching, explore, plain, space

from kivi_tvm import targets
from kivi_tvm.compile import schedule_hash, scheduled_function
from kivi_tvm.tune.space import Size, Space, explorer
from kivi_tvm.workloads import MODELS


def same(recipe):
    return "one program"


def test_walk_meets_every_point_once():
    points = list(space(branching).walk())
    found = [tuple(sorted(point.decisions.items())) for point in points]
    assert len(set(found)) == len(found)
    # serial: 2 lanes; tiled: 2 + 3 + 3 unrollings, one of which fails
    assert [point.failure for point in points].count(None) == 9
    assert [point.failure for point in points if point.failure] == ["too deep"]
    assert points[0].decisions == {}


def test_size_is_counted_or_estimated():
    assert space(branching).size() == Size(9, exact=True)
    assert str(space(same).size()) == "1"
    assert space(plain).size(limit=100) == Size(4096, exact=False)
    assert str(Size(4096, exact=False)) == "~4,100"
    assert str(Size(7, exact=False)) == "~7"
    assert str(Size(93 * 10**9, exact=False)) == "~9e+10"


def test_estimate_averages_branches():
    """Of 2 (serial) and about 8 points per branch, half of the paths see each."""
    found = space(branching)
    rng = random.Random(0)
    for _ in range(200):
        found.sample(rng)
    assert 7 < found.size(limit=1).points < 14


def test_sample_reaches_every_point():
    found, rng = space(branching), random.Random(0)
    met = {frozenset(found.sample(rng).decisions.items()) for _ in range(300)}
    assert met == {frozenset(point.decisions.items()) for point in found.walk()}


def test_every_point_is_run_once():
    run = explore(plain)
    found = Space(run)
    for _ in range(3):
        found.point({"a": 2, "b": 1})
        found.point({"a": 2})
    assert run.runs == 1  # with and without the default named


def test_foreign_decisions_fall_back():
    point = space(branching).point({"order": "tiled", "tile": 2, "unroll": 4, "lanes": 8})
    assert point.decisions == {"order": "tiled", "tile": 2} and point.failure is None
    assert space(branching).point({"absent": 1}).decisions == {}


def test_neighbours_differ_in_one_choice():
    found = space(branching)
    point = found.point({"order": "tiled", "tile": 8})
    assert found.neighbours(point) == [
        {"tile": 8},
        {"order": "tiled", "tile": 2},
        {"order": "tiled"},
        {"order": "tiled", "tile": 8, "unroll": 2},
        {"order": "tiled", "tile": 8, "unroll": 4},
    ]


def test_a_failing_default_is_remembered():
    def broken(recipe):
        raise ValueError("no such block")

    found = space(broken)
    assert found.default.failure == "no such block"
    assert found.size() == Size(0, exact=True)


def test_what_is_not_offered_falls_back_to_the_default():
    key = MODELS["smollm2-135m"].cfg.kernel_key()
    found = Space(explorer("attend_window", key, targets.resolve("native")))
    point = found.point({"chunk_tokens": 7, "absent": 1})
    assert point.failure is None and point.schedule_hash == found.default.schedule_hash


@pytest.mark.parametrize("name", ["advance", "append", "attend_window"])
def test_explorer_is_what_compile_does(name):
    key = MODELS["smollm2-135m"].cfg.kernel_key()
    target = targets.resolve("native")
    found = Space(explorer(name, key, target))
    assert found.default.decisions == {}
    for point in [found.default] + [found.sample(random.Random(seed)) for seed in range(3)]:
        schedule = scheduled_function(name, key, target, point.decisions)
        assert point.failure is None
        assert schedule_hash(name, schedule) == point.schedule_hash
