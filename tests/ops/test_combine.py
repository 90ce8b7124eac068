"""`combine` merges partial results by log-sum-exp and reads no others."""

import math

import pytest
import torch
from configurations import CONFIGS, config_id, library
from pools import Pool, poisoned
from tolerance import assert_close


def partials(cfg, batch_size, entries, spread):
    generator = torch.Generator().manual_seed(entries)
    shape = (batch_size, cfg.H, entries)
    acc = torch.randn(*shape, cfg.D, generator=generator)
    stat = torch.empty(*shape, 2)
    stat[..., 0] = spread * torch.randn(shape, generator=generator)
    stat[..., 1] = 1 + 100 * torch.rand(shape, generator=generator)
    return acc, stat


@pytest.mark.parametrize("spread", [1, 60])
@pytest.mark.parametrize("cfg", CONFIGS, ids=config_id)
def test_ragged_rows(cfg, spread):
    split, dtype = cfg.kernel_key().split_tokens, getattr(torch, cfg.dtype)
    lengths = [cfg.R + 3 * split, None, cfg.R + split + 1, 5, cfg.R + 1]
    pool = Pool(cfg, lengths)
    acc, stat = partials(cfg, len(lengths), 6, spread)
    room = poisoned((cfg.H, len(lengths), cfg.D + 4), dtype)
    out, lse = room[..., : cfg.D].movedim(0, 1), poisoned((len(lengths), cfg.H), torch.float32)
    expected = {}
    for row, _, length in pool.active():
        splits = -(-max(0, length - cfg.R) // split)
        entries = [*range(splits), 5]
        unread = [x for x in range(6) if x not in entries]
        a, s = acc[row, :, entries].double(), stat[row, :, entries].double()
        weight = torch.exp2(s[..., 0] - s[..., :1, 0])
        total = (weight * s[..., 1]).sum(-1)
        expected[row] = (
            (weight[..., None] * a).sum(1) / total[:, None],
            (s[:, 0, 0] + total.log2()) * math.log(2),
        )
        acc[row, :, unread] = math.nan
        stat[row, :, unread] = math.nan
    library(cfg)["combine"](pool.state, pool.slots, split, 1, acc, stat, out, lse)
    for row, (want, want_lse) in expected.items():
        assert_close(out[row], want, dtype, what=f"row {row}")
        assert_close(lse[row], want_lse, torch.float32, what=f"row {row} lse")
    inactive = lengths.index(None)
    assert (out[inactive] == 0).all() and (lse[inactive] == -math.inf).all()
    assert room[..., cfg.D :].isnan().all()
