"""How trials are dealt."""

import pytest

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
