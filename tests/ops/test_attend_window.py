"""`attend_window` against float64 attention over the newest ring tokens; other slots are poison."""

import pytest
import torch
from configurations import CONFIGS, FEW, config_id, library
from inputs import ATTENDED_DATA, draw, ragged, strided
from ops.partials import Partials
from pools import Pool


def check(cfg, lengths, data="normal", rollback=0, scale=None):
    inputs = draw(cfg, max(n or 0 for n in lengths), lengths, data=data)
    scale = cfg.D**-0.5 if scale is None else scale
    pool = Pool(cfg, lengths, rollback)
    pool.store_rings(inputs.k, inputs.v, write_back=False)
    parts = Partials(cfg, len(lengths), entries=3)
    names = ("k_ring", "v_ring", "state", "slots")
    library(cfg)["attend_window"](*pool.args(*names), strided(inputs.q[0]), scale, *parts.args)
    for row, length in enumerate(lengths):
        parts.assert_untouched(row, slice(0, 2))
        if length is None:
            parts.assert_untouched(row)
        elif length:
            window = slice(max(0, length - cfg.R), length)
            k, v = inputs.k[row, :, window], inputs.v[row, :, window]
            parts.assert_equals_softmax(row, 2, inputs.q[0, row], k, v, scale)


@pytest.mark.parametrize("data", ATTENDED_DATA)
@pytest.mark.parametrize("cfg", CONFIGS, ids=config_id)
def test_ragged_rows(cfg, data):
    check(cfg, [n for n in ragged(cfg) if n != 0], data)


@pytest.mark.parametrize("rollback", [5, 32])
@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_slots_behind_the_window_are_not_read(cfg, rollback):
    R = cfg.R
    check(cfg, [R - 1, R, None, R + 1, R + 5, 2 * R + 33, 500], rollback=rollback, scale=-0.1)


@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_an_empty_row_has_no_weight(cfg):
    pool = Pool(cfg, [0])
    parts = Partials(cfg, 1, entries=1)
    q = torch.ones(1, cfg.H, cfg.D, dtype=pool.buffers["k_ring"].dtype)
    names = ("k_ring", "v_ring", "state", "slots")
    library(cfg)["attend_window"](*pool.args(*names), q, 1.0, *parts.args)
    assert (parts.acc == 0).all() and (parts.stat[..., 1] == 0).all()
