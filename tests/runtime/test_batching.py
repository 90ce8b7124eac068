"""Continuous batching: rows end and begin while others go on, and nobody notices."""

import pytest
from caches import assert_same_contents, assert_unchanged, feed, new_cache, snapshot
from configurations import FEW, config_id, with_window
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import draw
from pools import assert_same_bits
from serving import Request, Server, assert_served_as_alone
from twins import SMALL, Twins

R, P = SMALL.R, SMALL.P
MODES = [{}, {"window": "exact", "rollback": 5}, {"rollback": 5, "sink_tokens": 4}]


REQUESTS = st.lists(
    st.builds(Request, st.integers(1, 3 * P), st.integers(1, R + 5), st.sampled_from([0, 0, 7, P])),
    min_size=1,
    max_size=6,
)


@settings(max_examples=12)
@given(REQUESTS, st.integers(1, 3), st.sampled_from(MODES))
def test_any_requests(requests, rows, mode):
    for seed, request in enumerate(requests):
        request.outputs.clear()
        request.draw(SMALL, seed)
    Server(SMALL, rows, **mode).serve(requests)
    for request in requests:
        assert_served_as_alone(SMALL, request, **mode)


@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_every_kind_of_kernel(cfg):
    cfg = with_window(cfg, cfg.G_k)
    shapes = [(150, 3, 0), (20, cfg.R + 1, 0), (90, 5, 40)]
    requests = [Request(*shape).draw(cfg, seed) for seed, shape in enumerate(shapes)]
    Server(cfg, 2).serve(requests)
    for request in requests:
        assert_served_as_alone(cfg, request)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_row_is_replaced_while_others_go_on(mode):
    twins = Twins(SMALL, 3, **mode)
    twins.prefill([0, 1, 2], [70, 20, 33])
    twins.decode(R)
    twins.free(1)
    twins.decode(R + 1)
    twins.check()
    twins.prefill([1], [100])
    twins.check()
    twins.decode(R)
    twins.check()


def test_prompts_of_several_rows_in_any_order():
    twins = Twins(SMALL, 4)
    twins.prefill([2, 0], [50, 9])
    twins.check()
    twins.decode()
    twins.free(2)
    twins.free(3)
    twins.prefill([3, 2], [1, 3 * P])
    twins.check()
    twins.extend([0, R, 3, 0])
    twins.check()


def test_a_new_row_begins_with_extend():
    twins = Twins(SMALL, 2)
    twins.prefill([0, 1], [70, 20])
    twins.free(1)
    twins.extend([1, 40])
    twins.check()
    twins.decode(R)
    twins.check()


def test_a_row_is_new_after_free():
    """Nothing of the old sequence is left, wherever the new one lands."""
    inputs = draw(SMALL, 200, [200, 150], steps=R)
    cache, fresh = new_cache(SMALL, 2, rollback=5), new_cache(SMALL, rollback=5)
    cache.prefill(inputs.k, inputs.v, [200, 150])
    cache.crop([20, 0])
    cache.free(0)
    assert cache.report()["refilled"] == [0, 0]
    cache.prefill(inputs.k[:1, :, :30], inputs.v[:1, :, :30], rows=[0])
    fresh.prefill(inputs.k[:1, :, :30], inputs.v[:1, :, :30])
    assert_same_contents(cache, 0, fresh, 0)
    found, expected = feed(cache, inputs, R), feed(fresh, inputs, R, slice(0, 1))
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one[0][:1], other[0], "out")
    assert cache.crop([5, 0]).exact and fresh.crop(5).exact
    assert_same_contents(cache, 0, fresh, 0)


def test_memory_of_ended_rows_is_used_again():
    inputs = draw(SMALL, 20 * P, batch_size=2)
    cache = new_cache(SMALL, 2)
    cache.prefill(inputs.k, inputs.v)
    before = cache.nbytes
    for row in (1, 0, 1):
        cache.free(row)
        cache.prefill(inputs.k[:1], inputs.v[:1], rows=[row])
    assert cache.nbytes == before


def test_all_rows_inactive():
    twins = Twins(SMALL, 2)
    twins.prefill([0, 1], [40, 3])
    twins.free(0)
    twins.free(1)
    twins.check()
    k, _ = twins.cache.layer(0).dequantize()
    assert k.shape == (2, SMALL.H_kv, 0, SMALL.D)
    twins.reset()
    assert twins.cache.active == [True, True]
    twins.prefill([0, 1], [3, 40])
    twins.check()


BAD_ROWS = [
    ([0], ["`prefill`", "empty rows", "[41, 0]"]),
    ([2], ["`rows`", "0..1", "2"]),
    ([-1], ["`rows`", "0..1", "-1"]),
    ([True], ["`rows`", "True"]),
    ([1, 1], ["`rows`", "1"]),
    ("1", ["`rows`"]),
]


@pytest.mark.parametrize(("rows", "words"), BAD_ROWS, ids=str)
def test_refused_rows_change_nothing(rows, words):
    inputs = draw(SMALL, 40, batch_size=2, steps=2)
    cache = new_cache(SMALL, 2)
    cache.prefill(inputs.k, inputs.v)
    feed(cache, inputs, 1)
    cache.free(1)
    before, report = snapshot(cache), cache.report()
    count = len(rows)
    with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        cache.prefill(inputs.k[:count], inputs.v[:count], rows=rows)
    assert all(word in str(error.value) for word in words), error.value
    assert_unchanged(cache, before, [41, 0])
    assert cache.report() == report


def test_tensors_have_one_entry_per_row_named():
    inputs = draw(SMALL, 40, batch_size=2)
    cache = new_cache(SMALL, 2)
    with pytest.raises(ValueError) as error:
        cache.prefill(inputs.k, inputs.v, rows=[1])
    assert "`k` must have shape [1, " in str(error.value)
    with pytest.raises(ValueError) as error:
        cache.prefill(inputs.k, inputs.v, [1], rows=[0, 1])
    assert "`lengths`" in str(error.value)
    assert cache.lengths == [0, 0]


def test_no_row_is_active():
    inputs = draw(SMALL, 9, steps=1)
    cache = new_cache(SMALL, 1)
    cache.prefill(inputs.k, inputs.v)
    cache.free(0)
    out, lse = cache.decode(inputs.q[0], inputs.k_new[0], inputs.v_new[0], return_lse=True)
    assert (out == 0).all() and (lse == -float("inf")).all()
    cache.prefill(inputs.k, inputs.v, lengths=[0])
    assert cache.lengths == [0] and cache.active == [False]
    cache.prefill(inputs.k, inputs.v)
    assert cache.lengths == [9] and cache.active == [True]
