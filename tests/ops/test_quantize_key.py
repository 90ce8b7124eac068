"""`quantize_key` writes the reference's codes, scales and zeros, and nothing else."""

import pytest
from configurations import library, spread
from inputs import ODD_TOKENS, QUANTIZED_DATA, draw, ragged, strided
from pools import Pool


def check(cfg, lengths, k):
    pool, expected = Pool(cfg, lengths), Pool(cfg, lengths)
    expected.store_keys(k)
    library(cfg)["quantize_key"](
        *pool.args("k_code", "k_scale", "k_zero", "table", "state", "slots"), k
    )
    pool.assert_equals(expected)


@pytest.mark.parametrize(("cfg", "data"), spread(QUANTIZED_DATA))
def test_ragged_rows(cfg, data):
    lengths = ragged(cfg)
    check(cfg, lengths, strided(draw(cfg, 500, lengths, data=data).k))


@pytest.mark.parametrize(("cfg", "tokens"), spread(ODD_TOKENS, 2))
def test_odd_tokens(cfg, tokens):
    check(cfg, [tokens, None, tokens], draw(cfg, tokens, batch_size=3).k)
