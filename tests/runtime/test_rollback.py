"""`crop` and `enable_rollback` with bad arguments, and rollback that is raised later."""

import pytest
from caches import assert_same_outputs, assert_unchanged, feed, new_cache, snapshot
from inputs import draw
from pairs import E, R, add, assert_equal_caches, assert_go_on_alike, pair
from twins import SMALL, Twins

WINDOWS = ("kivi", "exact")

BAD_COUNTS = [
    (-1, ValueError, ["-1"]),
    (True, ValueError, ["True"]),
    (1.0, TypeError, ["1.0"]),
    ("3", TypeError, ["3"]),
    (None, TypeError, ["None"]),
    (41, ValueError, ["41", "40"]),
    ([71, 0, 0], ValueError, ["71", "70"]),
    ([1, -1, 0], ValueError, ["-1"]),
    ([1, False, 0], TypeError, ["False"]),
    ([1, 1], ValueError, ["one entry per row (3)", "got 2"]),
    ([0, 0, 1], ValueError, ["1", "0"]),
    ([1.5, 0, 0], TypeError, ["1.5"]),
]


@pytest.mark.parametrize(("counts", "kind", "words"), BAD_COUNTS, ids=str)
def test_refused_counts_change_nothing(counts, kind, words):
    inputs = draw(SMALL, 70, [70, 40, 0])
    cache = new_cache(SMALL, 3, rollback=E)
    cache.prefill(inputs.k, inputs.v, [70, 40, 0])
    cache.free(2)
    before, report = snapshot(cache), cache.report()
    with pytest.raises(kind) as error:
        cache.crop(counts)
    assert all(word in str(error.value) for word in ["`c`", *words])
    assert_unchanged(cache, before, [70, 40, 0])
    assert cache.report() == report


def test_refused_in_an_open_step():
    inputs = draw(SMALL, 40)
    cache = new_cache(SMALL, num_layers=2)
    cache.layer(0).prefill(inputs.k, inputs.v)
    before = snapshot(cache)
    with pytest.raises(RuntimeError, match="step"):
        cache.crop(1)
    assert_unchanged(cache, before, [40])
    cache.layer(1).prefill(inputs.k, inputs.v)
    cache.crop(1)
    assert cache.lengths == [39]


@pytest.mark.parametrize("window", WINDOWS)
def test_rollback_that_is_raised_later(window):
    """From then on it is as if the cache had been made so; earlier tokens where still held."""
    twins = Twins(SMALL, 2, window=window)
    twins.prefill([0, 1], [5 * R + 3, R - 1])
    twins.enable_rollback(E)
    twins.check()
    twins.extend([E, E])
    twins.check()
    assert twins.crop([E, 4]).exact
    twins.check()
    twins.crop([2, 9])
    twins.check()
    twins.decode(R + 3)
    twins.check()


def test_rollback_that_is_raised_equals_rollback_from_the_start():
    cache, never, inputs = pair(SMALL, [5 * R + 3, R - 1], rollback=E)
    late = new_cache(SMALL, 2)
    late.prefill(inputs.k, inputs.v, [5 * R + 3, R - 1])
    late.enable_rollback(E)
    for each in (cache, never, late):
        add(each, 3, [2 * E + R, E + R])
    late.crop(E)
    cache.crop(E)
    assert_equal_caches(late, cache)
    assert_same_outputs(feed(late, inputs, R), feed(cache, inputs, R))


@pytest.mark.parametrize("tokens", [-1, True, 1.5, None])
def test_refused_rollback(tokens):
    inputs = draw(SMALL, 40)
    cache = new_cache(SMALL, rollback=3)
    cache.prefill(inputs.k, inputs.v)
    before = snapshot(cache)
    with pytest.raises((TypeError, ValueError)) as error:
        cache.enable_rollback(tokens)
    assert repr(tokens) in str(error.value)
    assert_unchanged(cache, before, [40])
    assert cache.rollback == 3


def test_less_rollback_changes_nothing():
    cache, never, inputs = pair(SMALL, [40, 3], rollback=E)
    cache.enable_rollback(2)
    assert cache.rollback == E
    add(cache, 1, [E, E])
    assert cache.crop(E).exact
    assert_go_on_alike(cache, never, inputs)
