"""`extend_new` (the operator `attend_new`) against float64 causal attention over new tokens."""

import pytest
import torch
from configurations import CONFIGS, FEW, config_id, library
from inputs import ATTENDED_DATA, draw
from ops.partials import Partials
from pools import poison_


def check(cfg, added, first, data="normal"):
    """Queries `first ..` of one pass; hidden tokens and those beyond a row's count are poison."""
    n, rows = max(max(added), 1), cfg.kernel_key().extend_rows
    inputs = draw(cfg, n, added, data=data)
    k, v = inputs.k.clone(), inputs.v.clone()
    for row, count in enumerate(added):
        seen = min(count, first + rows)
        poison_(k[row, :, seen:])
        poison_(v[row, :, seen:])
    B, scale = len(added), cfg.D**-0.5
    # Every query token asks the same: what differs is what it may see.
    q = inputs.q[0].unsqueeze(2).expand(B, cfg.H, rows, cfg.D).reshape(B, -1, cfg.D)
    parts = Partials(cfg, B, entries=3)
    parts.acc, parts.stat = (
        x.repeat_interleave(rows, 1).contiguous() for x in (parts.acc, parts.stat)
    )
    counts = torch.tensor(added, dtype=torch.int32)
    slots = torch.arange(B, dtype=torch.int32)
    library(cfg)["extend_new"](slots, counts, k, v, q, first, scale, *parts.args)
    acc = parts.acc.unflatten(1, (cfg.H, rows))
    stat = parts.stat.unflatten(1, (cfg.H, rows))
    for row, count in enumerate(added):
        for i in range(rows):
            if first + i >= count:
                continue
            one = Partials(cfg, B, entries=3)
            one.acc, one.stat = acc[:, :, i], stat[:, :, i]
            seen = slice(0, first + i + 1)
            one.assert_untouched(row, slice(0, 1))
            one.assert_untouched(row, slice(2, 3))
            one.assert_equals_softmax(
                row, 1, inputs.q[0, row], inputs.k[row, :, seen], inputs.v[row, :, seen], scale
            )


@pytest.mark.parametrize("cfg", CONFIGS, ids=config_id)
def test_first_pass_of_ragged_rows(cfg):
    rows = cfg.kernel_key().extend_rows
    check(cfg, [rows, 1, max(1, rows - 1)], first=0)


@pytest.mark.parametrize("data", ATTENDED_DATA)
@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_later_passes_see_earlier_tokens(cfg, data):
    rows = cfg.kernel_key().extend_rows
    check(cfg, [5 * rows, 2 * rows + 1, 4 * rows], first=2 * rows, data=data)


def test_a_row_without_new_tokens_has_no_weight():
    cfg = FEW[0]
    rows = cfg.kernel_key().extend_rows
    parts = Partials(cfg, 1, entries=2)
    acc, stat = (x.repeat_interleave(rows, 1).contiguous() for x in (parts.acc, parts.stat))
    dtype = getattr(torch, cfg.dtype)
    k = poison_(torch.empty(1, cfg.H_kv, 3, cfg.D, dtype=dtype))
    q = torch.ones(1, cfg.H * rows, cfg.D, dtype=dtype)
    zero = torch.zeros(1, dtype=torch.int32)
    library(cfg)["extend_new"](zero, zero, k, k, q, 0, 1.0, acc, stat)
    assert (acc[:, :, 0] == 0).all() and (stat[:, :, 0, 1] == 0).all()
