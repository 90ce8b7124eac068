"""`fill_window` leaves the last tokens of a prompt in the rings, packed keys dequantized."""

import pytest
from configurations import CONFIGS, config_id, library, spread
from inputs import ODD_TOKENS, QUANTIZED_DATA, draw, ragged, strided
from pools import Pool


def check(cfg, lengths, k, v, write_back, rollback):
    pool, expected = Pool(cfg, lengths, rollback), Pool(cfg, lengths, rollback)
    pool.store_keys(k)
    expected.store_keys(k)
    expected.store_rings(k, v, write_back)
    names = ("k_code", "k_scale", "k_zero", "k_ring", "v_ring", "table", "state", "slots")
    library(cfg)["fill_window"](*pool.args(*names), k, v, int(write_back))
    pool.assert_equals(expected)


@pytest.mark.parametrize(("cfg", "data"), spread(QUANTIZED_DATA))
def test_ragged_rows(cfg, data):
    lengths = ragged(cfg)
    inputs = draw(cfg, 500, lengths, data=data)
    check(cfg, lengths, strided(inputs.k), strided(inputs.v), write_back=True, rollback=0)


@pytest.mark.parametrize("rollback", [0, 5])
@pytest.mark.parametrize("write_back", [True, False])
@pytest.mark.parametrize("tokens", ODD_TOKENS)
@pytest.mark.parametrize("cfg", CONFIGS[::4], ids=config_id)
def test_odd_tokens(cfg, tokens, write_back, rollback):
    inputs = draw(cfg, tokens, batch_size=3)
    check(cfg, [tokens, None, tokens], inputs.k, inputs.v, write_back, rollback)
