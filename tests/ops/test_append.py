"""`append` turns the reference's cache of L tokens into its cache of L + 1, bit for bit."""

import pytest
import torch
from configurations import CONFIGS, config_id, library, spread
from inputs import QUANTIZED_DATA, draw, strided
from pools import Pool

NAMES = (
    "k_code", "k_scale", "k_zero", "v_code", "v_scale", "v_zero", "k_ring", "v_ring",
    "table", "state", "slots",
)  # fmt: skip


def check(cfg, lengths, data="normal", write_back=True, rollback=0, view=strided):
    after = [None if n is None else n + 1 for n in lengths]
    inputs = draw(cfg, max(1, *(n or 0 for n in after)), after, data=data)
    k, v = inputs.k, inputs.v
    row = torch.arange(len(after))
    last = torch.tensor([(n or 1) - 1 for n in after])
    k_new, v_new = k[row, :, last], v[row, :, last]
    # The pool of the longer rows, holding what the shorter ones left there.
    pool = Pool(cfg, after, rollback)
    pool.lengths = lengths
    pool.store(k, v, write_back)
    expected = Pool(cfg, after, rollback).store(k, v, write_back)
    added = torch.ones(len(after), dtype=torch.int32)
    k_new, v_new = view(k_new[:, :, None]), view(v_new[:, :, None])
    library(cfg)["append"](*pool.args(*NAMES), added, k_new, v_new, cfg.R, int(write_back))
    pool.assert_equals(expected)


@pytest.mark.parametrize(("cfg", "data"), spread(QUANTIZED_DATA))
def test_every_kind_of_step(cfg, data):
    """Nothing due, a value leaves, a block is flushed, both, on the first and a later page."""
    R = cfg.R
    check(cfg, [0, R - 1, None, R, 2 * R - 1, 2 * R, 499, 3 * R - 2, R + 1, R + 33], data)


@pytest.mark.parametrize("rollback", [0, 5])
@pytest.mark.parametrize("write_back", [True, False])
@pytest.mark.parametrize("cfg", CONFIGS[1::4], ids=config_id)
def test_windows(cfg, write_back, rollback):
    R = cfg.R
    lengths = [2 * R - 1, None, 3 * R - 1, R + 4, R + 5, 2 * R + 4, 2 * R + 5]
    check(cfg, lengths, write_back=write_back, rollback=rollback, view=torch.Tensor.contiguous)


@pytest.mark.parametrize("cfg", CONFIGS[2::8], ids=config_id)
def test_all_rows_inactive(cfg):
    check(cfg, [None, None])
