"""The authors' layout: written down here a second time, then there and back without a lost bit."""

from __future__ import annotations

import pytest
import torch
from caches import (
    assert_same_contents,
    assert_same_outputs,
    assert_unchanged,
    feed,
    new_cache,
    snapshot,
)
from configurations import FEW, config_id, with_window
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import QUANTIZED_DATA, draw
from pools import assert_same_bits

from kivi_tvm import reference
from kivi_tvm.errors import UserError
from kivi_tvm.runtime import authors
from kivi_tvm.runtime.authors import AuthorsCache, from_authors, to_authors

CFG = with_window(FEW[2], 32)


def pack_last(code, bits):
    """`new_pack.py`'s rule: word `i` holds elements `W i ...`, element `j` shifted by `b j`."""
    *outer, n = code.shape
    W = 32 // bits
    words = torch.zeros(*outer, n // W, dtype=torch.int64)
    for j in range(W):
        words |= code[..., j::W].long() << (bits * j)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def authors_prefill(cfg, k, v):
    """What their prefill leaves of `k, v [B, H_kv, T, D]`, with our scales and zeros."""
    T = k.shape[2]
    PK, PV = T - T % cfg.R, max(0, T - cfg.R)
    keys = reference.quantize(k[:, :, :PK].mT, cfg.key_bits, cfg.G_k, 3) if PK else None
    values = reference.quantize(v[:, :, :PV], cfg.value_bits, cfg.G_v, 3) if PV else None
    return AuthorsCache(
        pack_last(keys.code, cfg.key_bits) if PK else None,
        k[:, :, PK:] if T > PK else None,
        keys.scale if PK else None,
        keys.zero if PK else None,
        pack_last(values.code, cfg.value_bits) if PV else None,
        v[:, :, PV:],
        values.scale if PV else None,
        values.zero if PV else None,
        T,
    )


def assert_same_parts(found, expected):
    assert found.kv_seq_len == expected.kv_seq_len
    for name in AuthorsCache._fields[:-1]:
        one, two = getattr(found, name), getattr(expected, name)
        assert (one is None) == (two is None), name
        if one is not None:
            assert_same_bits(one, two, name)


def filled(cfg, tokens, batch_size=2, data="normal", **options):
    cache = new_cache(cfg, batch_size, **options)
    inputs = draw(cfg, tokens, batch_size=batch_size, data=data, steps=cfg.R + 3)
    cache.prefill(inputs.k, inputs.v)
    return cache, inputs


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64, 147])
@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_layout_is_theirs(cfg, tokens):
    cfg = with_window(cfg, cfg.G_k)
    cache, inputs = filled(cfg, tokens)
    assert_same_parts(to_authors(cache.layer(0)), authors_prefill(cfg, inputs.k, inputs.v))


@settings(max_examples=15)
@given(st.sampled_from(FEW), st.integers(1, 330), st.integers(0, 40), st.sampled_from([1, 2]))
def test_there_and_back(cfg, tokens, steps, blocks):
    """Decoding goes on with the same bits, across a flush."""
    cfg = with_window(cfg, blocks * cfg.G_k)
    cache, inputs = filled(cfg, tokens)
    feed(cache, inputs, min(steps, cfg.R))
    stored = to_authors(cache.layer(0))
    other = new_cache(cfg, 2)
    from_authors(other.layer(0), stored)
    assert other.lengths == cache.lengths
    assert_same_parts(to_authors(other.layer(0)), stored)
    for row in range(2):
        assert_same_contents(cache, row, other, row)
    more = draw(cfg, 1, batch_size=2, steps=cfg.R + 3, seed=1)
    assert_same_outputs(*(feed(each, more, cfg.R + 3) for each in (cache, other)))


@pytest.mark.parametrize("data", QUANTIZED_DATA)
def test_data(data):
    cache, _ = filled(CFG, 110, data=data)
    other = new_cache(CFG, 2)
    from_authors(other.layer(0), to_authors(cache.layer(0)))
    for row in range(2):
        assert_same_contents(cache, row, other, row)


@pytest.mark.parametrize("count", [3, 20, 60])
def test_rollback_begins_with_what_the_layout_holds(count):
    cache, _ = filled(CFG, 110)
    other = new_cache(CFG, 2, rollback=40)
    from_authors(other.layer(0), to_authors(cache.layer(0)))
    cache.enable_rollback(40)
    new = draw(CFG, CFG.R, batch_size=2, seed=2)
    q = torch.zeros(2, CFG.H, CFG.R, CFG.D)
    for each in (cache, other):
        each.extend(q, new.k, new.v)  # a flush
    assert cache.crop(count) == other.crop(count)
    more = draw(CFG, 1, batch_size=2, steps=CFG.R + 3, seed=1)
    assert_same_outputs(*(feed(each, more, CFG.R + 3) for each in (cache, other)))


def test_every_layer_of_a_step():
    cache, inputs = filled(CFG, 110)
    stored = to_authors(cache.layer(0))
    other = new_cache(CFG, 2, num_layers=2)
    from_authors(other.layer(1), stored)
    with pytest.raises(RuntimeError, match="the previous step is not finished"):
        to_authors(other.layer(1))
    with pytest.raises(RuntimeError, match="already called"):
        from_authors(other.layer(1), stored)
    other.layer(0).prefill(inputs.k, inputs.v)
    assert_same_parts(to_authors(other.layer(0)), stored)
    assert_same_parts(to_authors(other.layer(1)), stored)


def test_what_the_layout_cannot_hold():
    ragged = new_cache(CFG, 2)
    inputs = draw(CFG, 50, [50, 49])
    with pytest.raises(UserError, match=r"same length above 0, got lengths \[0, 0\]"):
        to_authors(ragged.layer(0))
    ragged.prefill(inputs.k, inputs.v, inputs.lengths)
    with pytest.raises(UserError, match=r"got lengths \[50, 49\]"):
        to_authors(ragged.layer(0))
    exact, _ = filled(CFG, 50, window="exact")
    with pytest.raises(UserError, match="`window` must be 'kivi', got 'exact'"):
        to_authors(exact.layer(0))


STORED = authors_prefill(CFG, *draw(CFG, 50, batch_size=2)[:2])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"kv_seq_len": 0}, ValueError, "`kv_seq_len` must be an int of at least 1, got 0"),
        ({"kv_seq_len": 51}, ValueError, r"`k_full` must have shape \[2, 2, 19, 128\]"),
        ({"kv_seq_len": 30}, ValueError, "`k_code` must be None for kv_seq_len=30"),
        ({"k_code": None}, TypeError, "`k_code` must be a torch tensor, got NoneType"),
        ({"k_code": STORED.k_code.long()}, TypeError, "`k_code` must be torch.int32"),
        ({"k_mn": STORED.k_mn.float()}, TypeError, "`k_mn` must be torch.float16"),
        ({"k_full": STORED.k_full.half()}, TypeError, "`k_full` must be torch.float32"),
        ({"v_scale": STORED.v_scale[:1]}, ValueError, r"`v_scale` must have shape \[2, 2, 18, 1\]"),
        ({"v_full": STORED.v_full[..., 1:]}, ValueError, "`v_full` must have shape"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_part_changes_nothing(change, error, words):
    cache = new_cache(CFG, 2)
    before = snapshot(cache)
    with pytest.raises(error, match=words):
        from_authors(cache.layer(0), STORED._replace(**change))
    assert_unchanged(cache, before, [0, 0])


def test_only_into_an_empty_cache_that_fits():
    cache, _ = filled(CFG, 3)
    with pytest.raises(RuntimeError, match="needs empty rows"):
        from_authors(cache.layer(0), STORED)
    with pytest.raises(UserError, match="`window` must be 'kivi', got 'exact'"):
        from_authors(new_cache(CFG, 2, window="exact").layer(0), STORED)
    small = new_cache(CFG, 2, max_tokens=49)
    with pytest.raises(ValueError, match="`max_tokens`=49"):
        from_authors(small.layer(0), STORED)
    assert small.lengths == [0, 0]


def test_a_failure_undoes_the_step_it_began(monkeypatch):
    cfg = FEW[0]
    inputs = draw(cfg, 70)
    cache, other = new_cache(cfg), new_cache(cfg)
    cache.prefill(inputs.k, inputs.v)
    stored = to_authors(cache.layer(0))

    def broken(*args):
        raise MemoryError

    monkeypatch.setattr(authors, "_row_from_authors", broken)
    with pytest.raises(MemoryError):
        from_authors(other.layer(0), stored)
    assert other.lengths == [0]
    monkeypatch.undo()
    from_authors(other.layer(0), stored)
    assert_same_contents(other, 0, cache, 0)
