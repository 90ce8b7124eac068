"""A prompt is stored as the reference stores it: rows of any length, in views, with padding."""

import pytest
import torch
from caches import assert_same_contents, contents, new_cache
from configurations import CONFIGS, FEW, config_id
from inputs import ODD_TOKENS, QUANTIZED_DATA, draw, strided
from pools import assert_same_bits

from kivi_tvm.reference import ReferenceCache


def lengths_of(cfg):
    R = cfg.R
    return [500, 1, R - 1, R, 0, R + 1, 2 * R + 31]


def assert_equals_reference(cache, reference):
    """Compare what attention will see, dequantized, with what the reference sees."""
    k, v = cache.dequantize()
    for row, expected in enumerate(reference.rows):
        n = expected.length
        for found, want in zip((k, v), expected.visible(), strict=True):
            assert_same_bits(found[row, :, :n], want.to(found.dtype), f"row {row}")
            assert (found[row, :, n:] == 0).all()


def check(cfg, inputs, batch_size, window="kivi", lengths=None):
    cache = new_cache(cfg, batch_size, window=window)
    reference = ReferenceCache(cfg, batch_size, window)
    lengths = inputs.lengths if lengths is None else lengths
    cache.prefill(inputs.k, inputs.v, lengths)
    reference.prefill(inputs.k, inputs.v, inputs.lengths)
    assert cache.lengths == [row.length for row in reference.rows]
    assert_equals_reference(cache, reference)
    return cache


@pytest.mark.parametrize("cfg", CONFIGS, ids=config_id)
def test_ragged_rows(cfg):
    inputs = draw(cfg, 500, lengths_of(cfg))
    check(cfg, inputs._replace(k=strided(inputs.k), v=strided(inputs.v)), 7)


@pytest.mark.parametrize("window", ["kivi", "exact"])
@pytest.mark.parametrize("data", QUANTIZED_DATA)
@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_data(cfg, data, window):
    check(cfg, draw(cfg, 500, lengths_of(cfg), data=data), 7, window)


@pytest.mark.parametrize("tokens", ODD_TOKENS)
@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_odd_tokens(cfg, tokens):
    check(cfg, draw(cfg, tokens, batch_size=2), 2)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, lambda n: torch.tensor(n).int()])
def test_lengths_in_any_form(kind):
    lengths = [40, 0, 97]
    check(FEW[0], draw(FEW[0], 97, lengths), 3, lengths=kind(lengths))


def test_no_tokens():
    cfg = FEW[0]
    cache = new_cache(cfg, 2)
    none = torch.zeros(2, cfg.H_kv, 0, cfg.D, dtype=cache.dtype)
    cache.prefill(none, none)
    assert cache.lengths == [0, 0]
    assert [x.shape[2] for x in cache.dequantize()] == [0, 0]
    check_after = draw(cfg, 50, batch_size=2)
    cache.prefill(check_after.k, check_after.v)
    assert cache.lengths == [50, 50]


def test_padding_is_never_stored():
    """Padding is NaN in the inputs; with other padding the same bits are stored."""
    cfg = FEW[1]
    inputs = draw(cfg, 500, lengths_of(cfg))
    one = check(cfg, inputs, 7)
    k, v = inputs.k.nan_to_num(7.0), inputs.v.nan_to_num(7.0)
    other = check(cfg, inputs._replace(k=k, v=v), 7)
    for row in range(7):
        assert_same_contents(one, row, other, row)


@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_nonfinite_elements_stay_in_their_group(cfg):
    """Every other group has the bits it would have without them."""
    clean = draw(cfg, 500)
    k, v = clean.k.clone(), clean.v.clone()
    k[0, 0, 3, 5], v[0, -1, 7, 9] = float("nan"), float("-inf")
    one, other = new_cache(cfg), new_cache(cfg)
    one.prefill(k, v)
    other.prefill(clean.k, clean.v)
    found, expected = contents(one, 0), contents(other, 0)
    for name in ("k_scale", "k_zero"):
        assert found[name].isnan().nonzero().tolist() == [[0, 0, 5]]
    for name in ("v_scale", "v_zero"):
        assert found[name].isnan().nonzero().tolist() == [[cfg.H_kv - 1, 9 // cfg.G_v, 7]]
    for name in ("k_scale", "k_zero", "v_scale", "v_zero"):
        same = torch.where(found[name].isnan(), expected[name], found[name])
        assert_same_bits(same, expected[name], name)
    k_dense, v_dense = one.dequantize()
    k_clean, v_clean = other.dequantize()
    assert k_dense[0, 0, : cfg.G_k, 5].isnan().all()
    group = slice(9 // cfg.G_v * cfg.G_v, (9 // cfg.G_v + 1) * cfg.G_v)
    assert v_dense[0, -1, 7, group].isnan().all()
    for dense, clean_dense in ((k_dense, k_clean), (v_dense, v_clean)):
        assert_same_bits(torch.where(dense.isnan(), clean_dense, dense), clean_dense)
