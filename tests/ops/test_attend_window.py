"""`attend_window` against float64 attention over the newest tokens; other slots are poison."""

import pytest
import torch
from configurations import CONFIGS, FEW, config_id, library
from inputs import ATTENDED_DATA, draw, ragged, strided
from ops.partials import Partials
from pools import Pool, assert_same_bits

NAMES = ("k_ring", "v_ring", "state", "slots")


def attended(cfg, lengths, inputs, rollback, scale, entry=1):
    """Three partial results, of which the call writes number `3 - entry`."""
    pool = Pool(cfg, lengths, rollback)
    pool.store_rings(inputs.k, inputs.v, write_back=False)
    parts = Partials(cfg, len(lengths), entries=3)
    q = strided(inputs.q[0])
    library(cfg)["attend_window"](*pool.args(*NAMES), q, scale, entry, *parts.args)
    return parts


def check(cfg, lengths, data="normal", rollback=0, scale=None, entry=1):
    inputs = draw(cfg, max(n or 0 for n in lengths), lengths, data=data)
    scale = cfg.D**-0.5 if scale is None else scale
    parts = attended(cfg, lengths, inputs, rollback, scale, entry)
    for row, length in enumerate(lengths):
        for other in {0, 1, 2} - {3 - entry}:
            parts.assert_untouched(row, slice(other, other + 1))
        if length is None:
            parts.assert_untouched(row)
        elif length:
            window = slice(max(0, length - cfg.R), length)
            k, v = inputs.k[row, :, window], inputs.v[row, :, window]
            parts.assert_equals_softmax(row, 3 - entry, inputs.q[0, row], k, v, scale)


@pytest.mark.parametrize("data", ATTENDED_DATA)
@pytest.mark.parametrize("cfg", CONFIGS, ids=config_id)
def test_ragged_rows(cfg, data):
    check(cfg, [n for n in ragged(cfg) if n != 0], data)


@pytest.mark.parametrize("rollback", [1, 5, 32])
@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_slots_behind_the_window_are_not_read(cfg, rollback):
    R = cfg.R
    check(cfg, [R - 1, R, None, R + 1, R + 5, 2 * R + 33, 500], rollback=rollback, scale=-0.1)


@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_the_size_of_the_ring_changes_no_bit(cfg):
    R = cfg.R
    lengths = [1, None, R - 1, R, R + 1, 2 * R + 33, 500]
    inputs = draw(cfg, 500, lengths)
    expected, *others = (attended(cfg, lengths, inputs, extra, 0.1) for extra in (0, 1, 17))
    for found in others:
        assert_same_bits(found.acc, expected.acc, "part_acc")
        assert_same_bits(found.stat, expected.stat, "part_stat")


@pytest.mark.parametrize("entry", [2, 3])
def test_the_entry_counts_from_the_end(entry):
    cfg = FEW[0]
    check(cfg, [cfg.R + 5, None, 3], rollback=1, entry=entry)


@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_an_empty_row_has_no_weight(cfg):
    pool = Pool(cfg, [0])
    parts = Partials(cfg, 1, entries=1)
    q = torch.ones(1, cfg.H, cfg.D, dtype=pool.buffers["k_ring"].dtype)
    library(cfg)["attend_window"](*pool.args(*NAMES), q, 1.0, 1, *parts.args)
    assert (parts.acc == 0).all() and (parts.stat[..., 1] == 0).all()
    assert (parts.stat[..., 0] == torch.finfo(torch.float32).min).all()
