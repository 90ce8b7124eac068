"""Decode steps against the float64 reference on the same codes, and their options."""

import math

import pytest
import torch
from caches import feed, largest_score, new_cache
from configurations import CONFIGS, FEW, config_id, module, with_window
from inputs import ATTENDED_DATA, draw, strided
from pools import poisoned
from tolerance import assert_close, limit

from kivi_tvm.reference import ReferenceCache


def check(cfg, lengths, steps, data="normal", window="kivi", scale=None, seed=0):
    B = len(lengths)
    inputs = draw(cfg, max(lengths), lengths, data=data, steps=steps, seed=seed)
    cache, reference = new_cache(cfg, B, window=window), ReferenceCache(cfg, B, window)
    cache.prefill(inputs.k, inputs.v, lengths)
    reference.prefill(inputs.k, inputs.v, lengths)
    for i in range(steps):
        q, k_new, v_new = inputs.q[i], inputs.k_new[i], inputs.v_new[i]
        out, lse = cache.decode(strided(q), strided(k_new), strided(v_new), scale, True)
        reference.append(k_new, v_new)
        want, want_lse = reference.attend(q, scale)
        worst = largest_score(reference, q, cfg.D**-0.5 if scale is None else scale)
        bound = limit(torch.float32, worst, module(cfg).manifest["compute"])
        for row in range(B):
            what = f"step {i} row {row}"
            assert_close(out[row], want[row], max_score=worst, what=what)
            assert_close(lse[row], want_lse[row], what=f"{what} lse", bound=bound)
    assert cache.lengths == [n + steps for n in lengths]


# The operators' tests compile from the first on, often at the same time: so neither waits.
@pytest.mark.parametrize("cfg", CONFIGS[::-1], ids=config_id)
def test_edges_of_the_window(cfg):
    R = cfg.R
    check(cfg, [R - 2, 0, R, 2 * R - 1, 500], steps=3, data="outlier")


@pytest.mark.parametrize("window", ["kivi", "exact"])
@pytest.mark.parametrize("data", ATTENDED_DATA)
@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_data(cfg, data, window):
    check(cfg, [700, 31, 2 * cfg.R + 33], 2, data, window)


@pytest.mark.parametrize("window", ["kivi", "exact"])
@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_from_empty_through_two_flushes(cfg, window):
    cfg = with_window(cfg, cfg.G_k)
    check(cfg, [0, cfg.R + 5], 2 * cfg.R + 3, window=window)


@pytest.mark.parametrize("scale", [1.0, 0.01, 0.0, -0.2])
def test_scale(scale):
    check(FEW[2], [300], 2, scale=scale)


def test_decode_before_prefill():
    """The first token attends to itself alone."""
    cfg = FEW[2]
    inputs = draw(cfg, 0, batch_size=2)
    cache = new_cache(cfg, 2)
    (out, lse), *_ = feed(cache, inputs, 1)
    assert_close(out, inputs.v_new[0].repeat_interleave(cfg.M, 1))
    k = inputs.k_new[0].repeat_interleave(cfg.M, 1)
    assert_close(lse, (inputs.q[0] * k).sum(-1) / math.sqrt(cfg.D))


@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_out_is_filled_and_returned(cfg):
    inputs = draw(cfg, 200, batch_size=2)
    q, k_new, v_new = inputs.q[0], inputs.k_new[0], inputs.v_new[0]
    results = []
    for out in (None, poisoned(q.shape, q.dtype), strided(q)):
        cache = new_cache(cfg, 2)
        cache.prefill(inputs.k, inputs.v)
        found = cache.decode(q, k_new, v_new, out=out)
        assert out is None or found is out
        results.append(found)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_results_are_not_views_of_shared_memory():
    inputs = draw(FEW[0], 100, steps=2)
    cache = new_cache(FEW[0])
    cache.prefill(inputs.k, inputs.v)
    (out, lse), (second, second_lse) = feed(cache, inputs, 2)
    assert out.data_ptr() != second.data_ptr() and lse.data_ptr() != second_lse.data_ptr()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inputs_of_a_model_without_gradients(context):
    """Parameters require gradients; under `no_grad` what is computed from them does not matter."""
    inputs = draw(FEW[2], 10)
    cache = new_cache(FEW[2])
    with context():
        cache.prefill(inputs.k.requires_grad_(), inputs.v.requires_grad_())
        out = cache.decode(inputs.q[0], inputs.k_new[0].requires_grad_(), inputs.v_new[0])
    assert out.isfinite().all() and cache.lengths == [11]


def test_a_nonfinite_key_poisons_only_its_own_heads():
    cfg = FEW[2]
    inputs = draw(cfg, 200, batch_size=2, steps=2)
    k = inputs.k.clone()
    k[0, 0, 3, 5] = math.nan
    clean, hurt = new_cache(cfg, 2), new_cache(cfg, 2)
    clean.prefill(inputs.k, inputs.v)
    hurt.prefill(k, inputs.v)
    for (expected, _), (out, _) in zip(feed(clean, inputs, 2), feed(hurt, inputs, 2), strict=True):
        assert out[0, : cfg.M].isnan().all()
        assert torch.equal(out[0, cfg.M :], expected[0, cfg.M :])
        assert torch.equal(out[1], expected[1])
