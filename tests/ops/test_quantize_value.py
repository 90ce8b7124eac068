"""`quantize_value` writes the reference's codes, scales and zeros, and nothing else."""

import pytest
from configurations import library, spread
from inputs import ODD_TOKENS, QUANTIZED_DATA, draw, ragged, strided
from pools import Pool


def check(cfg, lengths, v):
    pool, expected = Pool(cfg, lengths), Pool(cfg, lengths)
    expected.store_values(v)
    library(cfg)["quantize_value"](
        *pool.args("v_code", "v_scale", "v_zero", "table", "state", "slots"), v
    )
    pool.assert_equals(expected)


@pytest.mark.parametrize(("cfg", "data"), spread(QUANTIZED_DATA))
def test_ragged_rows(cfg, data):
    lengths = ragged(cfg)
    check(cfg, lengths, strided(draw(cfg, 500, lengths, data=data).v))


@pytest.mark.parametrize(("cfg", "tokens"), spread(ODD_TOKENS, 2))
def test_odd_tokens(cfg, tokens):
    check(cfg, [tokens, None, tokens], draw(cfg, tokens, batch_size=3).v)
