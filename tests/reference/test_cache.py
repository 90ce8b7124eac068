"""A batch of reference rows: rows come and go without a trace on others."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kivi_tvm import KiviConfig
from kivi_tvm.reference import ReferenceCache

CFG = KiviConfig(
    head_dim=64, num_heads=2, num_kv_heads=1, group_size=16, residual_length=32, dtype="float32"
)


def drawn(B, tokens, seed=0):
    """`q [B, H, T, D]`, `k, v [B, H_kv, T, D]`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, heads, tokens, 64, generator=generator) for heads in (2, 1, 1)]


def alone(k, v, row, n, **options):
    cache = ReferenceCache(CFG, 1, **options)
    cache.prefill(k[row : row + 1, :, :n], v[row : row + 1, :, :n])
    return cache


def assert_alike(row, other):
    for a, b in zip(row.visible(), other.visible(), strict=True):
        assert torch.equal(a, b)


def test_rows_are_independent():
    q, k, v = drawn(2, 50)
    cache = ReferenceCache(CFG, 2)
    cache.prefill(k, v, [50, 7])
    out, lse = cache.attend(q[:, :, 0])
    for row, n in enumerate((50, 7)):
        one, one_lse = alone(k, v, row, n).attend(q[row : row + 1, :, 0])
        assert torch.equal(one[0], out[row]) and torch.equal(one_lse[0], lse[row])


def test_options_reach_the_rows():
    _, k, v = drawn(1, 80)
    options = {"window": "exact", "rollback": 3, "sink_tokens": 4, "key_axis": "token"}
    row = alone(k, v, 0, 80, **options).rows[0]
    assert {name: getattr(row, name) for name in options} == options


@pytest.mark.parametrize("history", [0, 40, 100])
def test_extend_sees_the_history_as_it_was_and_the_new_tokens_exactly(history):
    n = 45
    q, k, v = drawn(2, history + n)
    cache = ReferenceCache(CFG, 2)
    cache.prefill(k, v, [history, history])
    before = [row.visible() if row.length else () for row in cache.rows]
    new = [x[:, :, history:] for x in (q, k, v)]
    out = cache.extend(*new, lengths=[n, n - 3], scale=0.2)
    for row, m in enumerate((n, n - 3)):
        q_new, k_new, v_new = (x[row, :, :m].double() for x in new)
        past = [x.double() for x in before[row]] or [k_new[:, :0]] * 2
        seen = [torch.cat(x, 1)[None] for x in zip(past, (k_new, v_new), strict=True)]
        causal = torch.ones(m, history + m, dtype=torch.bool).tril(history)
        expected = scaled_dot_product_attention(
            q_new[None], *seen, attn_mask=causal, scale=0.2, enable_gqa=True
        )
        torch.testing.assert_close(out[row, :, :m], expected[0])
        assert not out[row, :, m:].any()
        assert_alike(cache.rows[row], alone(k, v, row, history + m).rows[0])


def test_an_inactive_row_takes_nothing_and_gives_nothing():
    q, k, v = drawn(3, 40)
    cache = ReferenceCache(CFG, 3, rollback=2)
    cache.prefill(k, v)
    cache.rows[1] = None
    out = cache.decode(*(x[:, :, 0] for x in (q, k, v)))
    assert cache.lengths == [41, 0, 41]
    assert not out[1].any() and out[[0, 2]].all()
    assert (cache.attend(q[:, :, 0])[1][1] == -torch.inf).all()
    assert cache.crop([1, 0, 2]) == [0, 0, 0] and cache.lengths == [40, 0, 39]


def test_prefill_of_a_freed_row_leaves_the_others_alone():
    _, k, v = drawn(3, 60)
    cache = ReferenceCache(CFG, 3, sink_tokens=2)
    cache.prefill(k, v)
    cache.rows[1] = None
    cache.prefill(v, k, [0, 33, 0])
    assert cache.lengths == [60, 33, 60]
    assert_alike(cache.rows[1], alone(v, k, 1, 33, sink_tokens=2).rows[0])
    assert_alike(cache.rows[0], alone(k, v, 0, 60, sink_tokens=2).rows[0])


def test_without_lengths_tokens_go_to_active_rows():
    q, k, v = drawn(2, 10)
    cache = ReferenceCache(CFG, 2)
    cache.prefill(k, v, [10, 0])
    cache.rows[1] = None
    cache.extend(q, k, v)
    assert cache.lengths == [20, 0]
    cache.rows[0] = None
    cache.prefill(k, v)
    assert cache.lengths == [10, 10]


def test_crop_counts_per_row():
    _, k, v = drawn(3, 100)
    cache = ReferenceCache(CFG, 3, rollback=40)
    cache.prefill(k, v, [100, 70, 0])
    assert cache.crop([40, 3, 0]) == [0, 0, 0]
    assert cache.lengths == [60, 67, 0]
    assert_alike(cache.rows[0], alone(k, v, 0, 60).rows[0])
    cache.rows[2] = None
    assert cache.crop(60) == [cache.rows[0].refilled, cache.rows[1].refilled, 0]
    assert cache.lengths == [0, 7, 0]


def test_rollback_enabled_later_holds_what_comes_later():
    _, k, v = drawn(1, 110)
    cache = ReferenceCache(CFG, 1)
    cache.prefill(k, v, [100])
    cache.enable_rollback(10)
    cache.append(k[:, :, 100], v[:, :, 100])
    assert cache.crop(1) == [0]
    assert cache.crop(10) == [32]  # values of [58, 68) and keys of [64, 90) were dropped before


def test_selected_rows_are_independent_copies():
    _, k, v = drawn(3, 50)
    cache = ReferenceCache(CFG, 3)
    cache.prefill(k, v, [50, 20, 33])
    cache.rows[1] = None
    cache.select([2, 0, 2, 1])
    assert cache.lengths == [33, 50, 33, 0]
    cache.crop([3, 0, 0, 0])
    assert cache.lengths == [30, 50, 33, 0]
    assert_alike(cache.rows[2], alone(k, v, 2, 33).rows[0])
