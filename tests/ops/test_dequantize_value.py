"""`dequantize_value` gives `code * scale + zero` of the packed tokens, 0 beyond."""

import pytest
import torch
from configurations import library, spread
from inputs import QUANTIZED_DATA, draw, ragged
from pools import Pool, assert_same_bits, poisoned


@pytest.mark.parametrize(("cfg", "data"), spread(QUANTIZED_DATA))
def test_ragged_rows(cfg, data):
    lengths, dtype = ragged(cfg), getattr(torch, cfg.dtype)
    v = draw(cfg, 500, lengths, data=data).v
    pool = Pool(cfg, lengths)
    pool.store_values(v)
    found = poisoned((len(lengths), cfg.H_kv, 503, cfg.D), dtype)
    expected = found.clone()
    for row, _, _ in pool.active():
        dense = pool.dense_values(v, row).to(dtype)
        expected[row] = 0
        expected[row, :, : dense.shape[1]] = dense
    names = ("v_code", "v_scale", "v_zero", "table", "state", "slots")
    library(cfg)["dequantize_value"](*pool.args(*names), found)
    assert_same_bits(found, expected)
