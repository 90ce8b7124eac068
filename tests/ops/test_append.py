"""`append` turns the reference's cache of L tokens into its cache of L + 1, bit for bit."""

import pytest
import torch
from configurations import CONFIGS, config_id, library, spread
from inputs import QUANTIZED_DATA, draw, strided
from pools import Pool, assert_same_bits, poisoned

PAGES = ("k_code", "k_scale", "k_zero", "v_code", "v_scale", "v_zero")
TABLES = ("table", "state", "slots")


def call(pool, k_exact, added, k, v, write_back=True):
    """`append` on a pool; `k_exact` stands behind the rings."""
    buffers = (*pool.args(*PAGES, "k_ring", "v_ring"), k_exact, *pool.args(*TABLES))
    library(pool.cfg)["append"](*buffers, added, k, v, pool.cfg.R, int(write_back))


def exact_keys(pool, size):
    """A poisoned ring of `size` keys for every slot."""
    slots, H_kv, _, D = pool.buffers["k_ring"].shape
    return poisoned((slots, H_kv, size, D), pool.buffers["k_ring"].dtype)


def check(cfg, lengths, data="normal", write_back=True, rollback=0, view=strided):
    after = [None if n is None else n + 1 for n in lengths]
    inputs = draw(cfg, max(1, *(n or 0 for n in after)), after, data=data)
    k, v = inputs.k, inputs.v
    row = torch.arange(len(after))
    last = torch.tensor([(n or 1) - 1 for n in after])
    k_new, v_new = k[row, :, last], v[row, :, last]
    # The pool of the longer rows, holding what the shorter ones left there.
    pool = Pool(cfg, after, rollback)
    pool.lengths = lengths
    pool.store(k, v, write_back)
    expected = Pool(cfg, after, rollback).store(k, v, write_back)
    added = torch.ones(len(after), dtype=torch.int32)
    k_new, v_new = view(k_new[:, :, None]), view(v_new[:, :, None])
    # keys are kept exact in half of the checks, in a ring of another size
    k_exact = exact_keys(pool, 7 if rollback else 0)
    kept = k_exact.clone()
    for row_index, slot, _ in expected.active():
        if rollback:
            kept[slot, :, last[row_index] % 7] = k_new[row_index, :, 0]
    call(pool, k_exact, added, k_new, v_new, write_back)
    pool.assert_equals(expected)
    assert_same_bits(k_exact, kept, "k_exact")


@pytest.mark.parametrize(("cfg", "data"), spread(QUANTIZED_DATA))
def test_every_kind_of_step(cfg, data):
    """Nothing due, a value leaves, a block is flushed, both, on the first and a later page."""
    R = cfg.R
    check(cfg, [0, R - 1, None, R, 2 * R - 1, 2 * R, 499, 3 * R - 2, R + 1, R + 33], data)


@pytest.mark.parametrize("rollback", [0, 5])
@pytest.mark.parametrize("write_back", [True, False])
@pytest.mark.parametrize("cfg", CONFIGS[1::4], ids=config_id)
def test_windows(cfg, write_back, rollback):
    R = cfg.R
    lengths = [2 * R - 1, None, 3 * R - 1, R + 4, R + 5, 2 * R + 4, 2 * R + 5]
    check(cfg, lengths, write_back=write_back, rollback=rollback, view=torch.Tensor.contiguous)


@pytest.mark.parametrize("cfg", CONFIGS[2::8], ids=config_id)
def test_all_rows_inactive(cfg):
    check(cfg, [None, None])


@pytest.mark.parametrize("cfg", CONFIGS[1::8], ids=config_id)
def test_all_tokens_of_a_call_are_kept_exact(cfg):
    """Also those whose block is flushed, and of those that share a slot the last."""
    R, size = cfg.R, cfg.R + 3
    after, counts = [2 * R, R + 9, 2 * R + 5], [2 * R, 9, 0]
    inputs = draw(cfg, max(after), after, data="outlier")
    pool, expected = Pool(cfg, after, rollback=1), Pool(cfg, after, rollback=1)
    pool.lengths = [n - added for n, added in zip(after, counts, strict=True)]
    pool.store(inputs.k, inputs.v)
    expected.store(inputs.k, inputs.v)
    k_exact = exact_keys(pool, size)
    kept = k_exact.clone()
    k, v = (poisoned(x.shape, x.dtype) for x in (inputs.k, inputs.v))
    for row, slot, length in expected.active():
        token = torch.arange(length - counts[row], length)
        k[row, :, : counts[row]], v[row, :, : counts[row]] = (
            x[row][:, token] for x in (inputs.k, inputs.v)
        )
        token = token[-size:]
        kept[slot][:, token % size] = inputs.k[row][:, token]
    call(pool, k_exact, torch.tensor(counts, dtype=torch.int32), k, v)
    assert_same_bits(k_exact, kept, "k_exact")
    for name in PAGES:
        assert_same_bits(pool.buffers[name], expected.buffers[name], name)


@pytest.mark.parametrize("rollback", [1, 18])
@pytest.mark.parametrize("cfg", CONFIGS[1::8], ids=config_id)
def test_appending_again_changes_nothing(cfg, rollback):
    """A decode that failed is repeated: the value that leaves must still be there."""
    R = cfg.R
    after = [1, None, R - 1, R + 1, R + 2, 2 * R + 9, 499, 2 * R + rollback + 1]
    inputs = draw(cfg, max(n or 0 for n in after), after)
    pool, expected = Pool(cfg, after, rollback), Pool(cfg, after, rollback)
    pool.lengths = [None if n is None else n - 1 for n in after]
    pool.store(inputs.k, inputs.v)
    expected.store(inputs.k, inputs.v)
    last = torch.tensor([(n or 1) - 1 for n in after])
    k, v = (x[torch.arange(len(after)), :, last, None] for x in (inputs.k, inputs.v))
    k_exact, added = exact_keys(pool, rollback), torch.ones(len(after), dtype=torch.int32)
    call(pool, k_exact, added, k, v)
    pool.assert_equals(expected)
    once = k_exact.clone()
    call(pool, k_exact, added, k, v)
    pool.assert_equals(expected)
    assert_same_bits(k_exact, once, "k_exact")
