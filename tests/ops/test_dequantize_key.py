"""`dequantize_key` gives `code * scale + zero` of the packed tokens, 0 beyond."""

import pytest
import torch
from configurations import library, spread
from inputs import QUANTIZED_DATA, draw, ragged
from pools import Pool, assert_same_bits, poisoned


@pytest.mark.parametrize(("cfg", "data"), spread(QUANTIZED_DATA))
def test_ragged_rows(cfg, data):
    lengths, dtype = ragged(cfg), getattr(torch, cfg.dtype)
    k = draw(cfg, 500, lengths, data=data).k
    pool = Pool(cfg, lengths)
    pool.store_keys(k)
    found = poisoned((len(lengths), cfg.H_kv, 503, cfg.D), dtype)
    expected = found.clone()
    for row, _, _ in pool.active():
        dense = pool.dense_keys(k, row).to(dtype)
        expected[row] = 0
        expected[row, :, : dense.shape[1]] = dense
    names = ("k_code", "k_scale", "k_zero", "table", "state", "slots")
    library(cfg)["dequantize_key"](*pool.args(*names), found)
    assert_same_bits(found, expected)
