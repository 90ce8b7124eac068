"""The harness with a clock of its own: what is timed, in which order, on which copy."""

from __future__ import annotations

import pytest

from kivi_tvm.bench import harness
from kivi_tvm.bench.harness import Timing


def counting_clock():
    """Every reading is one microsecond after the last."""
    now = iter(range(0, 10**9, 1000))
    return lambda: next(now)


def test_percentiles_are_samples_that_were_seen():
    timing = Timing.of([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (timing.p20_us, timing.p50_us, timing.p80_us, timing.samples) == (2.0, 3.0, 5.0, 5)
    assert Timing.of([7.0]) == Timing(7.0, 7.0, 7.0, 1)


def test_gb_per_s_is_bytes_over_the_median():
    assert Timing(1.0, 1000.0, 1.0, 1).gb_per_s(25_000_000) == 25.0


def test_cases_take_turns_and_copies_rotate():
    seen = []
    cases = {
        "a": [lambda: seen.append("a0"), lambda: seen.append("a1")],
        "b": [lambda: seen.append("b0")],
    }
    timings = harness.interleave(
        cases, rounds=2, burst=2, clock=counting_clock(), sleep=seen.append
    )
    assert [each for each in seen if not isinstance(each, str)] == [harness.SETTLE_S] * 4
    seen = [each for each in seen if isinstance(each, str)]
    start, first, second = seen[:3], seen[3:9], seen[9:]
    assert start == ["a0", "a1", "b0"]
    assert first == ["a0", "a1", "a0", "b0", "b0", "b0"]
    assert second == ["b0", "b0", "b0", "a1", "a0", "a1"]
    assert timings["a"] == timings["b"] == Timing(1.0, 1.0, 1.0, 4)


def test_first_call_of_a_burst_is_not_timed():
    slow_first = iter([0, 50_000] + [0, 900_000] + [0, 50_000] * 3)
    elapsed = 0

    def clock():
        nonlocal elapsed
        elapsed += next(slow_first)
        return elapsed

    timing = harness.interleave({"a": [lambda: None]}, rounds=1, burst=3, clock=clock)["a"]
    assert timing == Timing(50.0, 50.0, 50.0, 3)


@pytest.mark.parametrize(("nbytes", "copies"), [(16 << 20, 8), (25 << 20, 6), (1 << 30, 2)])
def test_cold_copies_exceed_the_cache_several_times(nbytes, copies):
    assert harness.copies_for(nbytes, "cold", 32 << 20) == copies
    assert harness.copies_for(nbytes, "warm", 32 << 20) == 1


def test_errors_name_argument_rule_and_value():
    with pytest.raises(ValueError, match=r"`state` must be one of .*'tepid'"):
        harness.copies_for(1, "tepid", 1)
    with pytest.raises(ValueError, match="`rounds` and `burst` must be at least 1, got 0 and 4"):
        harness.interleave({}, rounds=0)


def test_read_case_reads():
    (call,) = harness.read_case(4096)
    assert call() == 1024
