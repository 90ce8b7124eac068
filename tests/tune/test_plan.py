"""How trials are dealt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kivi_tvm.tune.plan import Need, deal

MODULE = [Need("attend", 10**9, 1), Need("append", 10**4, 1), Need("combine", 9, 1)]
MODULE += [Need("advance", 1, 1)] * 3


@pytest.mark.parametrize("trials", [12, 48, 200, 1001])
def test_half_goes_to_attend(trials):
    shares = deal(trials, MODULE)
    assert sum(shares) == trials
    assert shares[0] >= trials / 2
    assert shares[3:] == [1, 1, 1]
    assert shares[1] >= shares[2] >= 1 and shares[2] <= 9


def test_defaults_are_measured_in_any_case():
    assert deal(2, MODULE) == [1, 1, 1, 1, 1, 1]
    assert deal(0, [Need("attend", 100), Need("append", 5, 1)]) == [0, 1]


def test_what_one_leaves_goes_to_the_others():
    assert deal(100, [Need("attend", 10), Need("append", 1000)]) == [10, 90]
    assert deal(100, [Need("attend", 1000), Need("append", 10)]) == [90, 10]
    assert deal(100, [Need("attend", 3), Need("append", 10)]) == [3, 10]
    assert deal(10, [Need("append", 50), Need("combine", 50)]) == [5, 5]
    assert deal(10, []) == []


def one_by_one(trials, needs):
    shares = [need.least for need in needs]
    for _ in range(trials - sum(shares)):
        if open_ := [i for i, need in enumerate(needs) if shares[i] < need.room]:
            shares[min(open_, key=lambda i: ((shares[i] + 1) / needs[i].weight, i))] += 1
    return shares


@given(
    st.integers(0, 300), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 3)), max_size=5)
)
def test_most_are_dealt_at_once_as_if_one_by_one(trials, found):
    needs = [Need("append", room, least) for room, least in found]
    assert deal(trials, needs) == one_by_one(trials, needs)


def test_any_number_of_trials_is_dealt_in_no_time():
    needs = [Need("attend", 2 * 10**8), Need("append", 10**15), Need("combine", 7)]
    shares = deal(10**12, needs)
    assert sum(shares) == 10**12 and shares[0] == 2 * 10**8 and shares[2] == 7
