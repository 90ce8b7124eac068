"""`extend`: history as it was, new tokens exact and causal, then stored as if one by one."""

import math

import pytest
import torch
from caches import assert_same_contents, assert_unchanged, new_cache, snapshot
from configurations import CONFIGS, FEW, config_id, with_window
from tolerance import assert_close

from kivi_tvm.reference import ReferenceCache, attention


def draw_turn(cfg, lengths, seed, width=None):
    """`q, k, v` of one call; what lies beyond a row's length is NaN."""
    generator = torch.Generator().manual_seed(seed)
    B, n, dtype = len(lengths), width or max(lengths), getattr(torch, cfg.dtype)
    q, k, v = (
        torch.randn(B, heads, n, cfg.D, generator=generator).to(dtype)
        for heads in (cfg.H, cfg.H_kv, cfg.H_kv)
    )
    for row, length in enumerate(lengths):
        k[row, :, length:] = v[row, :, length:] = math.nan
    return q, k, v


def expected_out(row, q, k, v):
    """Float64 attention of `q [H, n, D]` over the reference row and the new tokens, causal."""
    seen_k, seen_v = row.visible()
    found = []
    for i in range(q.shape[1]):
        keys = torch.cat([seen_k, k[:, : i + 1].float()], 1).double()
        values = torch.cat([seen_v, v[:, : i + 1].float()], 1).double()
        found.append(attention(q[:, i].double(), keys, values)[0])
    return torch.stack(found, 1)


def check(cfg, turns, window="kivi"):
    B = len(turns[0])
    cache, reference = new_cache(cfg, B, window=window), ReferenceCache(cfg, B, window)
    stepwise = [new_cache(cfg, 1, window=window) for _ in range(B)]
    for turn, lengths in enumerate(turns):
        q, k, v = draw_turn(cfg, lengths, turn)
        out = cache.extend(q, k, v, lengths=lengths)
        assert out.isfinite().all()
        for i, (row, n) in enumerate(zip(reference.rows, lengths, strict=True)):
            if n:
                want = expected_out(row, q[i, :, :n], k[i], v[i])
                assert_close(out[i, :, :n], want, out.dtype, what=f"turn {turn} row {i}")
            row.append(k[i, :, :n], v[i, :, :n])
            for t in range(n):
                stepwise[i].decode(q[i : i + 1, :, t], k[i : i + 1, :, t], v[i : i + 1, :, t])
    assert cache.lengths == [sum(turn[i] for turn in turns) for i in range(B)]
    for i in range(B):
        assert_same_contents(cache, i, stepwise[i], 0)
    q, k, v = draw_turn(cfg, [1] * B, 99)
    found = cache.decode(q[:, :, 0], k[:, :, 0], v[:, :, 0])
    for i in range(B):
        one = stepwise[i].decode(q[i : i + 1, :, 0], k[i : i + 1, :, 0], v[i : i + 1, :, 0])
        assert torch.equal(found[i : i + 1], one)


@pytest.mark.parametrize("cfg", CONFIGS[::3], ids=config_id)
def test_turns_across_flushes(cfg):
    cfg = with_window(cfg, cfg.G_k)
    check(cfg, [[3, 1], [cfg.R, 2 * cfg.R + 1], [0, 17], [16, 2]])


@pytest.mark.parametrize("window", ["kivi", "exact"])
@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_long_turns_go_in_passes(cfg, window):
    check(with_window(cfg, cfg.G_k), [[40, 100, 7], [33, 5, 90]], window)


def test_a_prompt_may_be_extended():
    cfg = with_window(FEW[0], 32)
    q, k, v = draw_turn(cfg, [200, 150], 1)
    whole, parts = new_cache(cfg, 2), new_cache(cfg, 2)
    whole.prefill(k, v, [200, 150])
    parts.prefill(k[:, :, :100], v[:, :, :100])
    parts.extend(q[:, :, 100:], k[:, :, 100:], v[:, :, 100:], lengths=[100, 50])
    for row in range(2):
        assert_same_contents(parts, row, whole, row)


def test_a_row_alone_gives_the_bits_of_the_batch():
    cfg = with_window(FEW[1], FEW[1].G_k)
    q, k, v = draw_turn(cfg, [150, 20, 150], 3)
    batch, alone = new_cache(cfg, 3), new_cache(cfg, 1)
    out = batch.extend(q, k, v, lengths=[150, 20, 150])
    found = alone.extend(q[1:2, :, :20], k[1:2, :, :20], v[1:2, :, :20])
    assert torch.equal(out[1:2, :, :20], found)
    q, k, v = draw_turn(cfg, [9, 9, 9], 4)
    assert torch.equal(batch.extend(q, k, v)[1:2], alone.extend(q[1:2], k[1:2], v[1:2]))


def test_a_later_token_with_nan_spares_earlier_queries():
    cfg = FEW[0]
    q, k, v = draw_turn(cfg, [6], 5)
    k[:, :, 4], v[:, :, 4] = math.nan, math.inf
    out = new_cache(cfg).extend(q, k, v)
    assert out[:, :, :4].isfinite().all() and out[:, :, 4:].isnan().all()


def test_layers_share_a_step():
    cfg = FEW[0]
    cache = new_cache(cfg, 1, num_layers=2)
    q, k, v = draw_turn(cfg, [5], 6)
    cache.begin(5)
    one = cache.layer(0).extend(q, k, v)
    two = cache.layer(1).extend(q, k, v)
    assert torch.equal(one, two) and cache.lengths == [5]


def test_one_token_between_decodes():
    """History is the state before the call on every kind of step."""
    cfg = with_window(FEW[0], 32)
    cache, reference = new_cache(cfg), ReferenceCache(cfg, 1)
    for turn in range(70):
        q, k, v = draw_turn(cfg, [1], turn)
        if turn % 3:
            cache.decode(q[:, :, 0], k[:, :, 0], v[:, :, 0])
        else:
            want = expected_out(reference.rows[0], q[0], k[0], v[0])
            assert_close(cache.extend(q, k, v)[0], want, q.dtype, what=f"turn {turn}")
        reference.append(k[:, :, 0], v[:, :, 0])


def test_no_tokens_change_nothing():
    cfg = FEW[0]
    cache = new_cache(cfg)
    q, k, v = draw_turn(cfg, [0], 7, width=1)
    assert cache.extend(q[:, :, :0], k[:, :, :0], v[:, :, :0]).shape == (1, cfg.H, 0, cfg.D)
    assert cache.lengths == [0]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda q, k, v: (q[:, :, :2], k, v), ValueError, "`k` must have shape"),
        (lambda q, k, v: (q[0], k, v), ValueError, "`q` must have shape"),
        (lambda q, k, v: (q, k.double(), v), TypeError, "`k` must be"),
        (lambda q, k, v: (q, k, v.mT.contiguous().mT), ValueError, "`v` must have inner stride 1"),
    ],
)
def test_refused_tensors_change_nothing(change, error, words):
    cfg = FEW[0]
    cache = new_cache(cfg)
    q, k, v = draw_turn(cfg, [40], 8)
    cache.extend(q, k, v)
    before = snapshot(cache)
    with pytest.raises(error, match=words):
        cache.extend(*change(q, k, v))
    assert_unchanged(cache, before, [40])


def test_refused_lengths_change_nothing():
    cfg = FEW[0]
    cache = new_cache(cfg, max_tokens=50)
    q, k, v = draw_turn(cfg, [40], 9)
    cache.extend(q, k, v)
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"`lengths` must be in 0\.\.40"):
        cache.extend(q, k, v, lengths=[41])
    with pytest.raises(ValueError, match=r"`max_tokens`=50 would be exceeded"):
        cache.extend(q, k, v)
    assert_unchanged(cache, before, [40])
